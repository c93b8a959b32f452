package engine

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/novalet/novalet"
)

// TestJVM: a Java machine sizes itself by what the flavor gives: a quarter of the memory for its heap, and as many
// collector threads as there are processors.
func TestJVM(t *testing.T) {
	te := newEngine(t)
	java, err := exec.LookPath("java")
	if err == nil {
		java, err = filepath.EvalSymlinks(java)
	}
	if err != nil {
		t.Skip("needs a Java runtime in PATH")
	}
	home := filepath.Dir(filepath.Dir(java))
	layers := debian(t)
	top, err := os.MkdirTemp(filepath.Dir(layers[0].Path), "novalet-java")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(top) })
	// By hard links, where the file system is the same. The runtime's configuration may lie in /etc.
	script := `chmod 755 "$2"; for d in "$1" /etc/java-*; do [ -d "$d" ] || continue
		mkdir -p "$2${d%/*}"; cp -al "$d" "$2$d" 2>/dev/null || { rm -rf "$2$d"; cp -a "$d" "$2$d"; }; done`
	if out, err := exec.Command("sh", "-c", script, "sh", home, top).CombinedOutput(); err != nil {
		t.Fatalf("copy %s: %v %s", home, err, out)
	}
	layers = append(layers, novalet.Layer{DiffID: "sha256:java", Path: top})
	te.run("j", novalet.Limits{MemoryBytes: 512 << 20, VCPUs: 1}, app(layers, "sleep 1000"))
	out, code := te.sh("j", java+" -XX:+UseParallelGC -XX:+PrintFlagsFinal -version 2>&1")
	if code != 0 {
		t.Skipf("this Java runtime does not run on a bare Debian: %s", out)
	}
	flags := map[string]int64{}
	for line := range strings.SplitSeq(out, "\n") {
		if f := strings.Fields(line); len(f) > 3 && f[2] == "=" {
			flags[f[1]], _ = strconv.ParseInt(f[3], 10, 64)
		}
	}
	if heap := flags["MaxHeapSize"]; heap < 96<<20 || heap > 160<<20 {
		t.Errorf("its heap is %d MiB, want a quarter of 512", heap>>20)
	}
	if n := flags["ParallelGCThreads"]; n != 1 {
		t.Errorf("it collects with %d threads, want 1", n)
	}
}
