// Command novalet-shim is the second program of novalet: keeper, init and exec helper of its instances. It is
// carried inside the novalet binary and run from a sealed memory file; nobody calls it by hand.
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/novalet/novalet/engine/guest"
	"github.com/novalet/novalet/engine/monitor"
)

// What has to stay on the main thread, since it sets up what belongs to a thread, runs while packages are initialised: there
// the main goroutine stays there by itself, where runtime.LockOSThread would start a further thread.
func init() {
	switch os.Args[0] {
	case "init":
		os.Exit(guest.Init())
	case "exec":
		os.Exit(guest.Exec())
	}
}

func main() {
	if os.Args[0] == "keeper" {
		os.Exit(keeper(os.Args[1:]))
	}
	fmt.Fprintln(os.Stderr, "novalet-shim is started by novalet only")
	os.Exit(2)
}

// keeper runs with a listening socket as descriptor 3, this program as descriptor 4, and its capacity as argument.
func keeper(args []string) int {
	capacity := 0
	if len(args) == 1 {
		capacity, _ = strconv.Atoi(args[0])
	}
	if capacity <= 0 {
		fmt.Fprintln(os.Stderr, "keeper: no capacity")
		return 2
	}
	if err := monitor.Run(monitor.Config{Listener: 3, Program: 4, Capacity: capacity}); err != nil {
		fmt.Fprintln(os.Stderr, "keeper:", err)
		return 1
	}
	return 0
}
