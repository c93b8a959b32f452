package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/glancebridge"
	"github.com/novalet/novalet/glancebridge/layer"
)

// defaultImages is the folder of images that the demo boots from.
const defaultImages = "/var/cache/novalet/images"

func imagesCommand() *command {
	return &command{name: "images", args: "[ls | tree | gc | verify | import FILE]", summary: "Show, check or clean the image store of this host",
		long: `ls lists the images with the progress of what is being fetched; tree shows the layers below each; gc removes what
nothing has used for longer than the [image_cache] options say. verify reads every stored layer again and names those
that are not what was stored; images with them are fetched again at their next use, or at once with --heal. Exit code 1
when one is left. import puts a file into the folder of images that the demo boots from, and needs no agent.`,
		flags: func(fs *pflag.FlagSet) {
			fs.Bool("json", false, "print JSON")
			fs.Bool("heal", false, "verify: fetch corrupt images again")
			fs.String("name", "", "import: the image's name (default that of the file)")
			fs.StringArray("property", nil, "import: KEY=value, as openstack image create takes it (repeatable)")
			fs.String("images", defaultImages, "import: the folder with the images")
			socketFlag(fs)
		},
		run: runImages}
}

func runImages(ctx context.Context, fs *pflag.FlagSet) error {
	verb := "ls"
	if fs.NArg() > 0 {
		verb = fs.Arg(0)
	}
	if want := map[string]int{"ls": 1, "tree": 1, "gc": 1, "verify": 1, "import": 2}[verb]; want == 0 || max(fs.NArg(), 1) != want {
		return usageError("want ls, tree, gc, verify, or import and a file")
	}
	for flag, of := range map[string]string{"heal": "verify", "name": "import", "property": "import", "images": "import"} {
		if fs.Changed(flag) && of != verb {
			return usageError("--%s belongs to %s", flag, of)
		}
	}
	switch verb {
	case "gc":
		n, err := client(fs).Collect(ctx)
		if err == nil {
			fmt.Printf("freed %s\n", size(n))
		}
		return err
	case "verify":
		return verifyImages(ctx, fs)
	case "import":
		return importImage(ctx, fs)
	}
	list, err := client(fs).Images(ctx)
	if err != nil {
		return err
	}
	if on, _ := fs.GetBool("json"); on {
		return printJSON(list)
	}
	printImages(os.Stdout, list, verb == "tree")
	return nil
}

func printImages(out io.Writer, list []novalet.ImageStatus, tree bool) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tNAME\tFORMAT\tLAYERS\tSIZE\tUSED BY\tLAST USED")
	for _, im := range list {
		last := im.LastUsed.Local().Format(time.DateTime)
		if im.LastUsed.IsZero() {
			last = "fetching"
			if im.Total > 0 {
				last = fmt.Sprintf("fetching, %d%% of %s", min(im.Progress, im.Total)*100/im.Total, size(im.Total))
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%d\t%s\n", im.ID, printable(dash(im.Name)), dash(im.Format), len(im.Layers), size(im.Size), len(im.UsedBy), last)
		if tree {
			for _, l := range im.Layers {
				fmt.Fprintf(w, "  %s\t\t\t\t%s\t\t\n", l.DiffID, size(l.Size))
			}
		}
	}
	w.Flush()
}

func verifyImages(ctx context.Context, fs *pflag.FlagSet) error {
	heal, _ := fs.GetBool("heal")
	list, err := client(fs).Verify(ctx, heal)
	if err != nil {
		return err
	}
	if on, _ := fs.GetBool("json"); on {
		if err := printJSON(list); err != nil {
			return err
		}
	} else {
		printChecks(os.Stdout, list)
	}
	for _, c := range list {
		if c.Problem != "" && !c.Healed {
			return &exitError{code: exitFailed}
		}
	}
	return nil
}

func printChecks(out io.Writer, list []novalet.LayerCheck) {
	var total int64
	bad := 0
	for _, c := range list {
		total += c.Size
		if c.Problem == "" {
			continue
		}
		bad++
		then := "is fetched again at the next use of its image"
		switch {
		case c.Healed:
			then = "fetched again"
		case c.Error != "":
			then = "not healed: " + c.Error
		}
		fmt.Fprintf(out, "%s  %s; %s\n", c.DiffID, printable(c.Problem), printable(then))
		for _, id := range c.Images {
			fmt.Fprintf(out, "  image %s\n", id)
		}
	}
	fmt.Fprintf(out, "%d layers read, %s, %d corrupt\n", len(list), size(total), bad)
}

// importImage copies a file into a folder of images. What it is decides its content, as for any image; of its formats
// only that of a disk has to be true.
func importImage(ctx context.Context, fs *pflag.FlagSet) error {
	file := fs.Arg(1)
	dir, _ := fs.GetString("images")
	name, _ := fs.GetString("name")
	if name == "" {
		name = filepath.Base(file)
	}
	props := map[string]string{}
	list, _ := fs.GetStringArray("property")
	for _, p := range list {
		k, v, ok := strings.Cut(p, "=")
		if !ok || k == "" {
			return usageError("--property %q: want KEY=value", p)
		}
		props[k] = v
	}
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	defer f.Close()
	head := make([]byte, layer.DetectLen)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("import image: read %s: %w", file, err)
	}
	format, err := layer.Detect(head[:n])
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	if text := layer.RefusalText(format); text != "" {
		return fmt.Errorf("import image: %s", text)
	}
	disk := "raw"
	if format == layer.FormatQcow2 || format == layer.FormatVmdk {
		disk = string(format)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	g := glancebridge.NewFileGlance(dir)
	have, err := g.List()
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	for _, r := range have {
		if r.Name == name {
			return fmt.Errorf("import image: %s has an image %q already (%s); give another --name", dir, name, r.ID)
		}
	}
	rec := glancebridge.ImageRecord{ImageMeta: novalet.ImageMeta{ID: newUUID(), Name: name, DiskFormat: disk, ContainerFormat: "bare", Properties: props}}
	if err := g.Create(rec); err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	if err := g.Upload(ctx, novalet.RequestContext{}, rec.ID, f); err != nil {
		return errors.Join(fmt.Errorf("import image: %w", err), g.Delete(context.WithoutCancel(ctx), novalet.RequestContext{}, rec.ID))
	}
	fmt.Println(rec.ID)
	return nil
}

// newUUID is a random one (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func size(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}
