// Package sriov finds the virtual functions of the host's network interfaces that the operator lets instances have, and
// reads which those are: [pci] device_spec of nova.conf in Nova's own syntax (nova/pci/devspec.py, whitelist.py).
//
// It starts no goroutines and keeps nothing on disk.
package sriov

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/novalet/novalet"
)

// Spec is one entry of device_spec: which devices, and the tags they get.
type Spec struct {
	vendor, product string // four digits; "" is any
	devname         string
	address         matcher // nil with devname
	// exact is the address when it names one function. One that is physical stands for its virtual ones.
	exact string
	tags  map[string]string
}

// matcher compares domain, bus, slot and function.
type matcher func(parts [4]string) bool

var maxima = [4]uint64{0xffff, 0xff, 0x1f, 7}
var widths = [4]int{4, 2, 2, 1}

// ParseSpecs reads the values of the option: each a JSON dict, or a list of them.
func ParseSpecs(values []string) ([]Spec, error) {
	var specs []Spec
	for _, text := range values {
		var list []map[string]any
		var one map[string]any
		if json.Unmarshal([]byte(text), &one) == nil && one != nil {
			list = append(list, one)
		} else if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, fmt.Errorf("%.80q is neither a JSON dict nor a list of them", text)
		}
		for _, entry := range list {
			s, err := parseSpec(entry)
			if err != nil {
				return nil, fmt.Errorf("%.120s: %w", text, err)
			}
			specs = append(specs, *s)
		}
	}
	return specs, nil
}

func parseSpec(entry map[string]any) (*Spec, error) {
	s := &Spec{tags: map[string]string{}}
	address := entry["address"]
	for key, value := range entry {
		if key == "address" {
			continue
		}
		var text string
		switch v := value.(type) {
		case string:
			text = v
		case bool:
			text = strconv.FormatBool(v)
		case nil:
			continue
		default:
			return nil, fmt.Errorf("%s is no text", key)
		}
		var err error
		switch key {
		case "vendor_id":
			s.vendor, err = hexID(text)
		case "product_id":
			s.product, err = hexID(text)
		case "devname":
			if s.devname = text; !nameRE.MatchString(text) {
				err = errors.New("no name of an interface")
			}
		case "remote_managed":
			if truth(text) {
				err = errors.New("devices that a SmartNIC manages cannot be used by containers")
			}
			s.tags[key] = "false"
		case "resource_class", "traits":
			err = errors.New("devices are not reported to Placement; leave it out")
		default:
			s.tags[key] = text
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if s.devname != "" {
		if address != nil && address != "" {
			return nil, errors.New("devname and address exclude each other")
		}
		return s, nil
	}
	var err error
	switch a := address.(type) {
	case nil:
		s.address, _, err = glob("*:*:*.*")
	case string:
		if a == "" {
			a = "*:*:*.*"
		}
		s.address, s.exact, err = glob(a)
	case map[string]any:
		s.address, err = expressions(a)
	default:
		err = errors.New("neither a text nor a dict")
	}
	if err != nil {
		return nil, fmt.Errorf("address: %w", err)
	}
	return s, nil
}

func truth(s string) bool {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "1", "t", "true", "on", "y", "yes":
		return true
	}
	return false
}

// hexID reads a vendor or product; "" is any.
func hexID(text string) (string, error) {
	text = strings.TrimSpace(text)
	if text == "*" || text == "" {
		return "", nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(text), "0x"), 16, 16)
	if err != nil {
		return "", fmt.Errorf("%.20q is no number of up to four hexadecimal digits", text)
	}
	return fmt.Sprintf("%04x", n), nil
}

// glob reads "*:0a:00.*". What is left out at its beginning is any, and so is an empty part.
func glob(text string) (m matcher, exact string, err error) {
	want := [4]string{"*", "*", "*", "*"}
	front, function, _ := strings.Cut(text, ".")
	if function = strings.TrimSpace(function); function != "" {
		want[3] = function
	}
	if front != "" {
		parts := strings.Split(front, ":")
		if len(parts) > 3 {
			return nil, "", fmt.Errorf("%.40q is no PCI address", text)
		}
		for i, p := range parts {
			if p = strings.TrimSpace(p); p != "" {
				want[3-len(parts)+i] = p
			}
		}
	}
	single := true
	for i, w := range want {
		if w == "*" {
			single = false
			continue
		}
		n, err := strconv.ParseUint(w, 16, 32)
		if err != nil || n > maxima[i] {
			return nil, "", fmt.Errorf("%.40q is no PCI address: %.20q", text, w)
		}
		want[i] = fmt.Sprintf("%0*x", widths[i], n)
	}
	if single {
		exact = fmt.Sprintf("%s:%s:%s.%s", want[0], want[1], want[2], want[3])
	}
	return func(parts [4]string) bool {
		for i, w := range want {
			if w != "*" && w != parts[i] {
				return false
			}
		}
		return true
	}, exact, nil
}

// expressions reads {"domain": ".*", "bus": "02", "slot": "01", "function": "[0-2]"}. As in Nova an expression has to fit the
// beginning.
func expressions(dict map[string]any) (matcher, error) {
	var res [4]*regexp.Regexp
	for i, key := range []string{"domain", "bus", "slot", "function"} {
		text, ok := dict[key].(string)
		if _, given := dict[key]; given && !ok {
			return nil, fmt.Errorf("%s is no text", key)
		}
		if !ok {
			text = ".*"
		}
		re, err := regexp.Compile("^(?:" + text + ")")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		res[i] = re
	}
	return func(parts [4]string) bool {
		for i, re := range res {
			if !re.MatchString(parts[i]) {
				return false
			}
		}
		return true
	}, nil
}

var addressRE = regexp.MustCompile(`^([0-9a-f]{4}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])$`)

// split takes an address apart. Those with a domain of more than four digits, which Nova leaves alone too, are none.
func split(address string) (parts [4]string, ok bool) {
	m := addressRE.FindStringSubmatch(address)
	if m == nil {
		return parts, false
	}
	copy(parts[:], m[1:])
	return parts, true
}

// fits says whether the entry lets a virtual function be used.
func (s *Spec) fits(d *novalet.PCIDevice, own func(devname string) string) bool {
	if s.vendor != "" && s.vendor != d.VendorID || s.product != "" && s.product != d.ProductID {
		return false
	}
	exact, match := s.exact, s.address
	if s.devname != "" {
		if s.devname == d.ParentName {
			return true
		}
		if exact = own(s.devname); exact == "" {
			return false
		}
		match = nil
	}
	if exact != "" && (exact == d.Parent || exact == d.Address) {
		return true
	}
	parts, ok := split(d.Address)
	return ok && match != nil && match(parts)
}
