package layer

import (
	"encoding/hex"
	"encoding/json"
)

// DeltaName is the member of a container archive that makes it a delta: its layers lie on top of those of another image,
// which it holds no bytes of. The config's diff_ids begin with the layers of that image, manifest.json has those of the
// archive alone; other tools refuse the difference.
const DeltaName = "novalet-delta.json"

// DeltaVersion is the version of the document DeltaName that is written; later ones are refused.
const DeltaVersion = 1

// Base names the image that a delta lies on, by its id and by the digest of its bytes as Glance records it. A claim of the
// archive's, which proves nobody's right to that image.
type Base struct {
	Version   int    `json:"version"`
	Image     string `json:"image"`
	HashAlgo  string `json:"os_hash_algo"`
	HashValue string `json:"os_hash_value"`
}

// Strong reports whether the digest is one that no other image has.
func (b *Base) Strong() bool {
	n, ok := map[string]int{"sha256": 32, "sha384": 48, "sha512": 64}[b.HashAlgo]
	sum, err := hex.DecodeString(b.HashValue)
	return ok && err == nil && len(sum) == n
}

// base reads the document that makes an archive a delta, nil when there is none.
func (c *container) base() (*Base, error) {
	doc, ok := c.docs[DeltaName]
	if !ok {
		return nil, nil
	}
	b := &Base{}
	if err := json.Unmarshal(doc, b); err != nil {
		return nil, Refuse("the archive's %s is damaged: %v", DeltaName, err)
	}
	switch {
	case b.Version > DeltaVersion:
		return nil, Refuse("the archive is a delta of version %d, which is newer than what this cloud reads; take a self-contained snapshot", b.Version)
	case b.Version < 1 || b.Image == "" || len(b.Image) > 128 || !b.Strong():
		return nil, Refuse("the archive's %s does not name a base image and its digest; take the snapshot again", DeltaName)
	}
	return b, nil
}
