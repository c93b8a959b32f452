package layer

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/novalet/novalet"
)

// dockerManifest is one element of a docker archive's manifest.json (moby, image/tarexport).
type dockerManifest struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// imageConfig is the configuration document of docker and OCI images, cut to what is used.
type imageConfig struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Config       *struct {
		Entrypoint []string
		Cmd        []string
		Env        []string
		WorkingDir string
		User       string
		StopSignal string
		Volumes    map[string]struct{}
		Labels     map[string]string
	} `json:"config"`
	RootFS struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// descriptor, index and manifest are those of the OCI image specification; the docker manifest list and schema 2
// manifest have the same members. One struct takes both documents, so that one that claims to be both is seen
// (CVE-2021-41190).
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	URLs        []string          `json:"urls"`
	Annotations map[string]string `json:"annotations"`
	Platform    *struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
	} `json:"platform"`
}

type ociDocument struct {
	MediaType string       `json:"mediaType"`
	Config    *descriptor  `json:"config"`
	Layers    []descriptor `json:"layers"`
	Manifests []descriptor `json:"manifests"`
}

// resolve finds the image among the members. manifest.json goes first: in an archive that has both it is the one
// docker itself reads, and index.json is known to lose entries (moby 51389).
func (c *container) resolve() (*Result, error) {
	if doc, ok := c.docs["manifest.json"]; ok {
		res, err := c.dockerArchive(doc)
		if res != nil || err != nil {
			return res, err
		}
	}
	if doc, ok := c.docs["index.json"]; ok {
		return c.ociLayout(doc)
	}
	if doc, ok := c.docs["repositories"]; ok {
		return c.v1Archive(doc)
	}
	return nil, Refuse("the archive has neither manifest.json nor index.json; it may be cut short: make it again with docker save")
}

// dockerArchive returns nil, nil when manifest.json holds nothing usable and index.json should be asked.
func (c *container) dockerArchive(doc []byte) (*Result, error) {
	var list []*dockerManifest
	if err := json.Unmarshal(doc, &list); err != nil {
		return nil, Refuse("the archive's manifest.json is damaged: %v", err)
	}
	_, hasIndex := c.docs["index.json"]
	list = slices.DeleteFunc(list, func(m *dockerManifest) bool {
		return m == nil || hasIndex && (m.Config == "" || len(m.Layers) == 0)
	})
	if len(list) == 0 {
		if hasIndex {
			return nil, nil
		}
		return nil, Refuse("the archive's manifest.json names no image")
	}
	m := list[0]
	if len(list) > 1 {
		var tags []string
		found := false
		for _, x := range list {
			tags = append(tags, x.RepoTags...)
			if c.o.Ref != "" && slices.Contains(x.RepoTags, c.o.Ref) {
				m, found = x, true
			}
		}
		if !found {
			return nil, Refuse("the archive holds %d images (%s); save one alone, or name one in the image property novalet_image_ref",
				len(list), short(strings.Join(tags, ", ")))
		}
	}
	cfg, err := c.document(m.Config)
	if err != nil {
		return nil, err
	}
	res := &Result{Format: "docker-archive"}
	for _, name := range m.Layers {
		i, ok := c.layerByName(name)
		if !ok {
			return nil, Refuse("the archive lacks the layer %q, which its manifest.json names; make it again with docker save", short(name))
		}
		if d := blobName(name); d != "" && d != c.layers[i].Blob {
			return nil, Refuse("the layer %s of the archive does not match its digest; upload the image again", d)
		}
		res.Order = append(res.Order, i)
	}
	return c.finish(res, cfg)
}

// ociLayout follows index.json to one manifest.
func (c *container) ociLayout(doc []byte) (*Result, error) {
	if _, ok := c.docs["oci-layout"]; !ok {
		return nil, Refuse("the archive has an index.json but no oci-layout file; it may be cut short")
	}
	found, others := map[string]*ociDocument{}, map[string]bool{}
	if err := c.walkIndex(doc, 0, c.o.Ref == "", found, others); err != nil {
		return nil, err
	}
	switch {
	case len(found) == 0 && len(others) > 0:
		return nil, archRefused(strings.Join(slices.Sorted(maps.Keys(others)), ", "), c.o.Arch)
	case len(found) == 0:
		return nil, Refuse("the archive's index.json names no image that can run here")
	case len(found) > 1:
		return nil, Refuse("the archive holds %d images; save one alone, or name one in the image property novalet_image_ref", len(found))
	}
	var m *ociDocument
	for _, m = range found {
	}
	if m.Config == nil {
		return nil, Refuse("the image's manifest names no config")
	}
	cfg, err := c.blobDocument(m.Config)
	if err != nil {
		return nil, err
	}
	res := &Result{Format: "oci-archive"}
	for _, d := range m.Layers {
		if len(d.URLs) > 0 || strings.Contains(d.MediaType, "foreign") || strings.Contains(d.MediaType, "nondistributable") {
			return nil, Refuse("the image has a layer that lies elsewhere (foreign layer); save it with all its layers")
		}
		if !isDigest(d.Digest) {
			return nil, Refuse("the image's manifest has the digest %q, which is none", short(d.Digest))
		}
		i, ok := c.layerByName("blobs/sha256/" + d.Digest[len("sha256:"):])
		if !ok {
			return nil, Refuse("the archive lacks the layer %s; make it again", d.Digest)
		}
		if c.layers[i].Blob != d.Digest {
			return nil, Refuse("the layer %s of the archive does not match its digest; upload the image again", d.Digest)
		}
		res.Order = append(res.Order, i)
	}
	return c.finish(res, cfg)
}

// walkIndex collects the manifests for our platform. named is false while a tag is still looked for.
func (c *container) walkIndex(doc []byte, depth int, named bool, found map[string]*ociDocument, others map[string]bool) error {
	if depth > 4 {
		return Refuse("the image's indexes are nested too deeply")
	}
	var idx ociDocument
	if err := json.Unmarshal(doc, &idx); err != nil {
		return Refuse("the archive's index is damaged: %v", err)
	}
	if len(idx.Layers) > 0 || idx.Config != nil {
		return Refuse("the archive's index claims to be a manifest too")
	}
	if len(idx.Manifests) > 1000 {
		return Refuse("the archive's index has more than 1000 images")
	}
	for _, d := range idx.Manifests {
		if d.Annotations["vnd.docker.reference.type"] != "" {
			continue // an attestation
		}
		match := named || d.Annotations["org.opencontainers.image.ref.name"] == c.o.Ref ||
			d.Annotations["io.containerd.image.name"] == c.o.Ref
		if p := d.Platform; p != nil {
			if p.OS != "" && p.OS != "linux" {
				if p.OS != "unknown" {
					others[p.OS] = true
				}
				continue
			}
			if p.Architecture != "" && !sameArch(p.Architecture, c.o.Arch) {
				others[p.Architecture] = true
				continue
			}
		}
		sub, err := c.blobDocument(&d)
		if err != nil {
			return err
		}
		var m ociDocument
		if err := json.Unmarshal(sub, &m); err != nil {
			return Refuse("the image's manifest is damaged: %v", err)
		}
		switch {
		case len(m.Manifests) > 0 && (len(m.Layers) > 0 || m.Config != nil):
			return Refuse("a document of the image claims to be index and manifest at once")
		case m.Config == nil:
			if err := c.walkIndex(sub, depth+1, match, found, others); err != nil {
				return err
			}
		case match:
			if d.Platform == nil {
				if cfg, err := c.blobDocument(m.Config); err == nil {
					var ic imageConfig
					if json.Unmarshal(cfg, &ic) == nil && ic.Architecture != "" && !sameArch(ic.Architecture, c.o.Arch) {
						others[ic.Architecture] = true
						continue
					}
				}
			}
			found[d.Digest] = &m
		}
	}
	return nil
}

// v1Archive follows the parents of archives older than manifest.json.
func (c *container) v1Archive(doc []byte) (*Result, error) {
	var repos map[string]map[string]string
	if err := json.Unmarshal(doc, &repos); err != nil {
		return nil, Refuse("the archive's repositories file is damaged: %v", err)
	}
	ids := map[string]bool{}
	for name, tags := range repos {
		for tag, id := range tags {
			if c.o.Ref == "" || c.o.Ref == name+":"+tag {
				ids[id] = true
			}
		}
	}
	if len(ids) != 1 {
		return nil, Refuse("the archive holds %d images; save one alone, or name one in the image property novalet_image_ref", len(ids))
	}
	res := &Result{Format: "docker-archive"}
	var top []byte
	for id := slices.Collect(maps.Keys(ids))[0]; id != ""; {
		b, err := c.document(id + "/json")
		if err != nil {
			return nil, err
		}
		if top == nil {
			top = b
		}
		i, ok := c.layerByName(id + "/layer.tar")
		if !ok {
			return nil, Refuse("the archive lacks the layer of %q; make it again with docker save", short(id))
		}
		res.Order = append(res.Order, i)
		if len(res.Order) > maxLayers {
			return nil, Refuse("the image has more than %d layers, or its parents go in a circle", maxLayers)
		}
		var v1 struct{ Parent string }
		if err := json.Unmarshal(b, &v1); err != nil {
			return nil, Refuse("the description of layer %q is damaged: %v", short(id), err)
		}
		id = v1.Parent
	}
	slices.Reverse(res.Order)
	return c.finish(res, top)
}

// finish checks the config against the layers and takes over what it says.
func (c *container) finish(res *Result, doc []byte) (*Result, error) {
	var cfg imageConfig
	if err := json.Unmarshal(doc, &cfg); err != nil {
		return nil, Refuse("the image's config is damaged: %v", err)
	}
	if len(res.Order) == 0 {
		return nil, Refuse("the image has no layers")
	}
	if len(res.Order) > maxLayers {
		return nil, Refuse("the image has more than %d layers; squash it", maxLayers)
	}
	base, err := c.base()
	if err != nil {
		return nil, err
	}
	res.Base = base
	if ids := cfg.RootFS.DiffIDs; len(ids) > 0 || base != nil {
		if base != nil {
			// What comes first is the base's.
			res.Format = "delta-archive"
			ids = ids[max(len(ids)-len(res.Order), 0):]
		}
		if len(ids) != len(res.Order) {
			return nil, Refuse("the image's config names %d layers, its manifest %d; make the archive again", len(ids), len(res.Order))
		}
		for i, id := range ids {
			if c.indexing {
				c.layers[res.Order[i]].DiffID = id
				continue
			}
			if got := c.layers[res.Order[i]].DiffID; got != id {
				return nil, Refuse("layer %d of the image does not match the digest in its config; make the archive again", i)
			}
		}
	}
	if cfg.OS != "" && cfg.OS != "linux" {
		return nil, Refuse("the image is for %s; only linux images run here", short(cfg.OS))
	}
	if cfg.Architecture != "" && !sameArch(cfg.Architecture, c.o.Arch) {
		return nil, archRefused(cfg.Architecture, c.o.Arch)
	}
	res.Layers, res.HasConfig = c.layers, true
	res.Config.Architecture = cfg.Architecture
	if k := cfg.Config; k != nil {
		res.Config = novalet.ImageConfig{
			Entrypoint: k.Entrypoint, Cmd: k.Cmd, Env: k.Env, WorkingDir: k.WorkingDir, User: k.User,
			StopSignal: k.StopSignal, Labels: k.Labels, Architecture: cfg.Architecture,
			Volumes: slices.Sorted(maps.Keys(k.Volumes)),
		}
	}
	return res, nil
}

// layerByName and document follow one link: skopeo writes the same layer's other names as symlinks.
func (c *container) layerByName(name string) (int, bool) {
	name = path.Clean(name)
	if i, ok := c.byName[name]; ok {
		return i, true
	}
	i, ok := c.byName[c.links[name]]
	return i, ok
}

func (c *container) document(name string) ([]byte, error) {
	name = path.Clean(name)
	b, ok := c.docs[name]
	if !ok {
		b, ok = c.docs[c.links[name]]
	}
	if !ok {
		return nil, Refuse("the archive lacks %q, which its manifest names; make it again with docker save", short(name))
	}
	if d := blobName(name); d != "" && d != digest(b) {
		return nil, Refuse("%q of the archive does not match its digest; upload the image again", short(name))
	}
	return b, nil
}

func (c *container) blobDocument(d *descriptor) ([]byte, error) {
	if !isDigest(d.Digest) {
		return nil, Refuse("the image's manifest has the digest %q, which is none", short(d.Digest))
	}
	return c.document("blobs/sha256/" + d.Digest[len("sha256:"):])
}

// blobName is the digest of a member of the blobs folder, or of one that bears a digest as its name.
func blobName(name string) string {
	if id, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && isHex(id) {
		return "sha256:" + id
	}
	if isDigest(name) {
		return name
	}
	return ""
}

func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && isHex(hex)
}

func digest(b []byte) string {
	h := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(h[:])
}

// sameArch compares OCI's names and the kernel's.
func sameArch(a, b string) bool { return normalArch(a) == normalArch(b) }

func normalArch(a string) string {
	switch a = strings.ToLower(a); a {
	case "x86_64", "x86-64":
		return "amd64"
	case "aarch64", "arm64v8":
		return "arm64"
	case "i386", "i686", "x86":
		return "386"
	case "armv7l", "armhf", "armv7":
		return "arm"
	}
	return a
}

func archRefused(image, host string) error {
	return Refuse("the image is for %s, this cloud's hosts are %s; upload it for that architecture", short(image), host)
}
