package contracttest

import (
	"errors"
	"slices"
	"testing"

	"github.com/novalet/novalet"
)

// ImageFixture is a store and an image in its Glance.
type ImageFixture struct {
	Store   novalet.ImageStore
	ImageID string // can be booted, and is larger than a byte
	// Unknown names an image that does not exist.
	Unknown string
	// Backup makes a backup of an instance in the Glance, newer than those made before, and returns its image's id.
	Backup func(instanceUUID, backupType string) string
	// Exists reports whether the Glance has an image.
	Exists func(imageID string) bool
}

// ImageStore runs the suite of novalet.ImageStore.
func ImageStore(t *testing.T, fixture func(t *testing.T) *ImageFixture) {
	const instance = "0f0c2d8a-0000-4000-8000-00000000aaaa"
	request := func(id string) *novalet.ImageRequest {
		return &novalet.ImageRequest{InstanceUUID: instance, ImageID: id, Meta: novalet.ImageMeta{ID: id}}
	}
	t.Run("prepare and release", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		var first *novalet.Image
		twice(t, "prepare", func() error {
			img, err := f.Store.Prepare(ctx, request(f.ImageID))
			if err != nil {
				return err
			}
			if img.ID != f.ImageID || len(img.Layers) == 0 || img.Kind == "" {
				t.Errorf("image %+v", img)
			}
			if first == nil {
				first = img
			} else if len(first.Layers) != len(img.Layers) || first.Layers[0].DiffID != img.Layers[0].DiffID {
				t.Errorf("a second prepare gave other layers: %v, %v", first.Layers, img.Layers)
			}
			return nil
		})
		twice(t, "release", func() error { return f.Store.Release(ctx, instance) })
	})
	t.Run("release of nothing", func(t *testing.T) {
		f := fixture(t)
		twice(t, "release", func() error { return f.Store.Release(testContext(t), instance) })
	})
	t.Run("unknown", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		_, err := f.Store.Prepare(ctx, request(f.Unknown))
		aborts(t, "prepare", err)
	})
	t.Run("too large", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		r := request(f.ImageID)
		r.MaxBytes = 1
		_, err := f.Store.Prepare(ctx, r)
		aborts(t, "prepare", err)
	})
	t.Run("rotate backups", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		const other = "0f0c2d8a-0000-4000-8000-00000000bbbb"
		var daily []string
		for range 5 {
			daily = append(daily, f.Backup(instance, "daily"))
		}
		left := []string{f.Backup(instance, "weekly"), f.Backup(other, "daily"), f.ImageID}
		rotate := func(keep int64, want []string) {
			t.Helper()
			twice(t, "rotate backups", func() error {
				return f.Store.RotateBackups(ctx, novalet.RequestContext{}, instance, "daily", keep)
			})
			for _, id := range append(slices.Clone(daily), left...) {
				if wanted := slices.Contains(want, id) || slices.Contains(left, id); f.Exists(id) != wanted {
					t.Errorf("keeping %d of %v: image %s exists: %v", keep, daily, id, !wanted)
				}
			}
		}
		rotate(9, daily)
		rotate(2, daily[3:])
		rotate(0, nil)
	})
	t.Run("delete an image", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		id := f.Backup(instance, "daily")
		if err := f.Store.DeleteImage(ctx, novalet.RequestContext{}, id); err != nil || f.Exists(id) {
			t.Errorf("delete image: %v, exists: %v", err, f.Exists(id))
		}
		is(t, "delete image again", f.Store.DeleteImage(ctx, novalet.RequestContext{}, id), novalet.ErrNotFound)
	})
	t.Run("verify", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		img, err := f.Store.Prepare(ctx, request(f.ImageID))
		if err != nil {
			t.Fatal(err)
		}
		for _, heal := range []bool{false, true} {
			list, err := f.Store.Verify(ctx, heal)
			if err != nil || len(list) != len(img.Layers) {
				t.Fatalf("verify: %+v, %v; the image has %+v", list, err, img.Layers)
			}
			for _, c := range list {
				if c.Problem != "" || c.Healed || !slices.Contains(c.Images, f.ImageID) {
					t.Errorf("verify: %+v", c)
				}
			}
		}
	})
	t.Run("list and collect", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		if _, err := f.Store.Prepare(ctx, request(f.ImageID)); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Store.Collect(ctx); err != nil {
			t.Errorf("collect: %v", err)
		}
		list, err := f.Store.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, s := range list {
			found = found || s.ID == f.ImageID
		}
		if !found {
			t.Errorf("list %+v lacks the leased image", list)
		}
	})
}

// NetworkFixture is a network service.
type NetworkFixture struct {
	API       novalet.NetworkAPI
	Instance  *novalet.Instance
	NetworkID string
	// PortID is a port that the user made.
	PortID string
}

// NetworkAPI runs the suite of novalet.NetworkAPI.
func NetworkAPI(t *testing.T, fixture func(t *testing.T) *NetworkFixture) {
	rc := novalet.RequestContext{RequestID: "req-contract"}
	t.Run("allocate and deallocate", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		info, err := f.API.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: f.Instance,
			Networks: []novalet.NetworkRequest{{PortID: f.PortID}, {NetworkID: f.NetworkID}}})
		if err != nil {
			t.Fatal(err)
		}
		if len(info) != 2 || info[0].ID != f.PortID || !info[0].PreserveOnDelete || info[1].PreserveOnDelete || info[1].ID == "" {
			t.Fatalf("allocated %+v, want the user's port first and kept", info)
		}
		again, err := f.API.Refresh(ctx, rc, f.Instance, info)
		if err != nil || len(again) != 2 || again[0].ID != info[0].ID || !again[0].PreserveOnDelete || again[1].PreserveOnDelete {
			t.Errorf("refresh gave %+v, %v", again, err)
		}
		if _, err := f.API.PortActive(ctx, info[1].ID); err != nil {
			t.Errorf("port active: %v", err)
		}
		twice(t, "deallocate", func() error { return f.API.Deallocate(ctx, rc, f.Instance, info) })
		_, err = f.API.PortActive(ctx, info[1].ID)
		is(t, "the port made for the instance", err, novalet.ErrNotFound)
		if _, err := f.API.PortActive(ctx, f.PortID); err != nil {
			t.Errorf("the user's port: %v", err)
		}
	})
	t.Run("deallocate finds what it was not told", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		info, err := f.API.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: f.Instance, Networks: []novalet.NetworkRequest{{NetworkID: f.NetworkID}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := f.API.Deallocate(ctx, rc, f.Instance, nil); err != nil {
			t.Fatal(err)
		}
		_, err = f.API.PortActive(ctx, info[0].ID)
		is(t, "the port", err, novalet.ErrNotFound)
	})
	t.Run("release", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		info, err := f.API.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: f.Instance, Attach: true, Networks: []novalet.NetworkRequest{{NetworkID: f.NetworkID}}})
		if err != nil {
			t.Fatal(err)
		}
		twice(t, "release", func() error { return f.API.Release(ctx, rc, f.Instance, &info[0]) })
		_, err = f.API.PortActive(ctx, info[0].ID)
		is(t, "the port", err, novalet.ErrNotFound)
	})
	t.Run("unbind and bind", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		info, err := f.API.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: f.Instance, Networks: []novalet.NetworkRequest{{NetworkID: f.NetworkID}}})
		if err != nil {
			t.Fatal(err)
		}
		twice(t, "unbind", func() error { return f.API.Unbind(ctx, rc, f.Instance, info) })
		bound, err := f.API.Bind(ctx, rc, f.Instance, info)
		if err != nil || len(bound) != 1 || bound[0].ID != info[0].ID {
			t.Errorf("bind gave %+v, %v", bound, err)
		}
		if err := f.API.Deallocate(ctx, rc, f.Instance, bound); err != nil {
			t.Errorf("deallocate: %v", err)
		}
	})
	t.Run("a port of somebody else", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		_, err := f.API.Allocate(ctx, &novalet.AllocateRequest{Context: rc, Instance: f.Instance, Networks: []novalet.NetworkRequest{{PortID: "0f0c2d8a-0000-4000-8000-00000000ffff"}}})
		aborts(t, "allocate", err)
	})
	t.Run("no port", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		_, err := f.API.PortActive(ctx, "0f0c2d8a-0000-4000-8000-00000000ffff")
		is(t, "port active", err, novalet.ErrNotFound)
	})
}

// PlugFixture is a plugger, a VIF it can plug, and a namespace to plug into.
type PlugFixture struct {
	Plugger      novalet.VIFPlugger
	VIF          *novalet.VIF
	NetNS        string
	InstanceUUID string
}

// VIFPlugger runs the suite of novalet.VIFPlugger. The fixture is asked for on the goroutine of the test that uses it, so it
// may move that into a network namespace.
func VIFPlugger(t *testing.T, fixture func(t *testing.T) *PlugFixture) {
	t.Run("plug and unplug", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		if err := f.Plugger.Check(f.VIF); err != nil {
			t.Fatalf("check: %v", err)
		}
		r := &novalet.PlugRequest{InstanceUUID: f.InstanceUUID, VIF: f.VIF, NetNS: f.NetNS}
		twice(t, "plug", func() error { return f.Plugger.Plug(ctx, r) })
		// The kind of the instance may become known after the plug.
		r.Static = true
		twice(t, "plug with addresses", func() error { return f.Plugger.Plug(ctx, r) })
		twice(t, "configure", func() error { return f.Plugger.Configure(ctx, r) })
		stats, err := f.Plugger.Stats(ctx, f.InstanceUUID, novalet.NetworkInfo{*f.VIF})
		if _, ok := stats[f.VIF.ID]; err != nil || !ok {
			t.Errorf("stats %v, %v", stats, err)
		}
		twice(t, "cut", func() error { return f.Plugger.Cut(ctx, f.InstanceUUID, f.VIF) })
		twice(t, "unplug", func() error { return f.Plugger.Unplug(ctx, f.InstanceUUID, f.VIF) })
	})
	t.Run("unplug of nothing", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		twice(t, "cut", func() error { return f.Plugger.Cut(ctx, f.InstanceUUID, f.VIF) })
		twice(t, "unplug", func() error { return f.Plugger.Unplug(ctx, f.InstanceUUID, f.VIF) })
	})
	t.Run("binding failed", func(t *testing.T) {
		f := fixture(t)
		v := *f.VIF
		v.Type = "binding_failed"
		// Another host may have the agent that this one lacks, so either kind will do; the tenant reads why.
		err := f.Plugger.Check(&v)
		if !errors.Is(err, novalet.ErrAbort) && !errors.Is(err, novalet.ErrReschedule) || novalet.FaultText(err) == "" {
			t.Errorf("check: %v, want ErrAbort or ErrReschedule with a text", err)
		}
	})
	t.Run("sweep", func(t *testing.T) {
		f, ctx := fixture(t), testContext(t)
		if err := f.Plugger.Plug(ctx, &novalet.PlugRequest{InstanceUUID: f.InstanceUUID, VIF: f.VIF, NetNS: f.NetNS}); err != nil {
			t.Fatal(err)
		}
		if swept, err := f.Plugger.Sweep(ctx, map[string]bool{f.InstanceUUID: true}); err != nil || len(swept) > 0 {
			t.Errorf("sweep of what is kept: %v, %v", swept, err)
		}
		swept, err := f.Plugger.Sweep(ctx, map[string]bool{})
		if err != nil || len(swept) != 1 {
			t.Errorf("sweep: %v, %v; want one", swept, err)
		}
		if swept, err = f.Plugger.Sweep(ctx, map[string]bool{}); err != nil || len(swept) > 0 {
			t.Errorf("second sweep: %v, %v", swept, err)
		}
	})
}
