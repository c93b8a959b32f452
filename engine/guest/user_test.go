package guest

import (
	"errors"
	"slices"
	"testing"

	"github.com/novalet/novalet/engine/monitor/wire"
)

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:100:101:web:/srv:/bin/sh\n1000:x:5:6:odd:/odd:/bin/sh\nbroken\nbad:x:+7:8::/:/bin/sh\nhuge:x:99999:8::/:/bin/sh\n"
	group  = "root:x:0:\nweb:x:101:\nextra:x:102:web,other\nbad:x:-1:web\n"
)

func TestLookupUser(t *testing.T) {
	for spec, want := range map[string]ids{
		"":          {0, 0, nil, "/root", "root"},
		"root":      {0, 0, nil, "/root", "root"},
		"0":         {0, 0, nil, "/root", "root"},
		"web":       {100, 101, []uint32{102}, "/srv", "web"},
		"100":       {100, 101, []uint32{102}, "/srv", "web"},
		"web:extra": {100, 102, nil, "/srv", "web"},
		"web:7":     {100, 7, nil, "/srv", "web"},
		"4000":      {4000, 0, nil, "/", "4000"},
		"65535:1":   {65535, 1, nil, "/", "65535"},
		"1000":      {5, 6, nil, "/odd", "1000"}, // a user of that name comes first, as in login(1)
	} {
		got, err := lookupUser(spec, passwd, group)
		if err != nil || got.uid != want.uid || got.gid != want.gid || !slices.Equal(got.groups, want.groups) || got.home != want.home || got.name != want.name {
			t.Errorf("%q: %+v %v, want %+v", spec, got, err, want)
		}
	}
	for _, spec := range []string{"+1", "-1", " 1", "1 ", "0x1", "1e3", "65536", "99999999999999999999", "nobody", "bad", "huge", "web:bad2", "web:+1", "a:b:c", "web\n", "web:65536", "٣"} {
		_, err := lookupUser(spec, passwd, group)
		var we *wire.Error
		if !errors.As(err, &we) || we.Code != wire.CodeAbort {
			t.Errorf("%q: %v", spec, err)
		}
	}
	if got, err := lookupUser("", "", ""); err != nil || got.uid != 0 || got.home != "/root" {
		t.Errorf("an image without users: %+v %v", got, err)
	}
}

func FuzzLookupUser(f *testing.F) {
	f.Add("web", passwd, group)
	f.Add("0:0", "a:b:c:d:e:f:g", "")
	f.Fuzz(func(t *testing.T, spec, p, g string) {
		id, err := lookupUser(spec, p, g)
		if err == nil && (id.uid > 65535 || id.gid > 65535 || len(id.groups) > 256) {
			t.Fatalf("%+v", id)
		}
	})
}
