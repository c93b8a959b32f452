package novadriver

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/novalet/novalet"
	"github.com/novalet/novalet/novadriver/ovo"
)

// identityFile holds the ComputeNode's uuid, which is also the resource provider's.
const identityFile = "compute_id"

// identityVersion is the service version from which stock keeps the file (2023.1).
const identityVersion = 65

// identity finds the uuid of this node. The rules are stock's: a host that was registered and has lost the file, or that
// has instances and is unknown to Nova, does not start, since it would be taken for another one.
func (d *Driver) identity(ctx context.Context, registered bool) (string, error) {
	path := filepath.Join(d.o.StateDir, identityFile)
	b, err := os.ReadFile(path)
	switch {
	case err == nil:
		id := strings.ToLower(strings.TrimSpace(string(b)))
		if !isUUID(id) {
			return "", fmt.Errorf("read %s: it holds no uuid", path)
		}
		if !registered && len(d.agent().Tracked()) > 0 {
			return "", fmt.Errorf("no compute service %s is known to Nova, but this host has %d instances: wrong database, or the option host "+
				"was changed", d.o.Host, len(d.agent().Tracked()))
		}
		return id, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("read the node's identity: %w", err)
	}
	id := newUUID()
	switch {
	case registered && d.service.version() >= identityVersion:
		return "", fmt.Errorf("the compute service %s was registered before, but %s is missing: restore the file (it holds the uuid "+
			"of the host's compute node), or delete the service to start afresh", d.o.Host, path)
	case registered:
		if id, err = d.adoptNode(ctx, id); err != nil {
			return "", err
		}
	case len(d.agent().Tracked()) > 0:
		return "", fmt.Errorf("no compute service %s is known to Nova, but this host has %d instances: wrong database, or the option host was "+
			"changed", d.o.Host, len(d.agent().Tracked()))
	}
	if err := writeIdentity(path, id); err != nil {
		return "", fmt.Errorf("write the node's identity: %w", err)
	}
	return id, nil
}

// adoptNode returns the uuid of the one node that a release without identity files has for this host, or fresh when
// there is none.
func (d *Driver) adoptNode(ctx context.Context, fresh string) (string, error) {
	raw, err := d.rpc.class(ctx, d.adminContext(), "ComputeNodeList", "get_all_by_host", []any{d.o.Host}, nil)
	if isClass(err, "ComputeHostNotFound") {
		return fresh, nil
	}
	if err != nil {
		return "", fmt.Errorf("list the nodes of host %s: %w", d.o.Host, err)
	}
	l, err := ovo.Decode(raw)
	if err != nil {
		return "", fmt.Errorf("list the nodes of host %s: %w", d.o.Host, err)
	}
	nodes := l.Objects()
	if len(nodes) != 1 {
		return "", fmt.Errorf("host %s has %d compute nodes: write the uuid of the right one into the file %s", d.o.Host, len(nodes), identityFile)
	}
	id := nodes[0].String("uuid")
	if !isUUID(id) {
		return "", fmt.Errorf("the compute node of host %s has no usable uuid", d.o.Host)
	}
	return id, nil
}

// writeIdentity writes the file whole or not at all.
func writeIdentity(path, id string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), identityFile+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(id + "\n")
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// findNode looks for the ComputeNode and leaves it in d.node; nothing is there on a first start.
func (d *Driver) findNode(ctx context.Context, uuid string) error {
	rctx := d.adminContext()
	rctx.Set("read_deleted", "yes")
	raw, err := d.rpc.class(ctx, rctx, "ComputeNode", "get_by_uuid", []any{uuid}, nil)
	if isClass(err, "ComputeHostNotFound") {
		d.setNode(&node{uuid: uuid})
		return nil
	}
	if err != nil {
		return fmt.Errorf("read compute node %s: %w", uuid, err)
	}
	o, err := ovo.Decode(raw)
	if err != nil || o == nil {
		return fmt.Errorf("read compute node %s: %w", uuid, errors.Join(err, o.Require("id")))
	}
	if n := o.String("hypervisor_hostname"); n != "" && d.o.anyNode {
		d.o.Node = n
	}
	if h, n := o.String("host"), o.String("hypervisor_hostname"); h != "" && h != d.o.Host || n != "" && n != d.o.Node {
		return fmt.Errorf("compute node %s is %s on host %s in Nova, but this is %s on host %s: a host cannot be renamed; "+
			"set host (and the node's name) back, or remove the old service and the file %s", uuid, n, h, d.o.Node, d.o.Host, identityFile)
	}
	nd := &node{uuid: uuid, id: o.Int("id"), deleted: o.Bool("deleted"), saved: map[string]json.RawMessage{}}
	for _, f := range nodeFields {
		if v, ok := o.Data[f]; ok {
			nd.saved[f] = v
		}
	}
	d.setNode(nd)
	return nil
}

// node is the ComputeNode as Nova has it.
type node struct {
	uuid    string
	id      int64 // 0: not created yet
	deleted bool
	saved   map[string]json.RawMessage // fields as last read or written
}

func (d *Driver) setNode(n *node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.node = n
	if n.id != 0 && !d.nodeKnown {
		d.nodeKnown = true
		close(d.nodeReady)
	}
}

func (d *Driver) nodeUUID() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.node == nil {
		return ""
	}
	return d.node.uuid
}

// computeID is the value of Instance.compute_id that goes with a node's name: null without a node. It waits for our
// node to be created.
func (d *Driver) computeID(ctx context.Context, name any) (any, error) {
	if name == nil || name == "" {
		return nil, nil
	}
	if name != d.o.Node {
		return nil, fmt.Errorf("node %v is not this host's", name)
	}
	select {
	case <-d.nodeReady:
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: wait for the compute node: %w", novalet.ErrTryAgain, context.Cause(ctx))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.node.id, nil
}

// newUUID makes a random uuid.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: it ends the program instead
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// jitter spreads an interval by a tenth either way, so that hosts started together do not ask together.
func jitter(d time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(d)/5+1))
	if err != nil {
		return d
	}
	return d - d/10 + time.Duration(n.Int64())
}
