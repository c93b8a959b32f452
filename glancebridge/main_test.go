package glancebridge

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case HelperCommand:
			os.Exit(HelperMain(os.Args[2:]))
		case crashCommand:
			os.Exit(crashMain(os.Args[2:]))
		case stallCommand:
			os.Exit(stallMain(os.Args[2:]))
		case probeCommand:
			os.Exit(probeMain(os.Args[2:]))
		}
	}
	code := m.Run()
	if helperDir != "" {
		_ = os.RemoveAll(helperDir)
	}
	os.Exit(code)
}
