// Package verdict holds the error the disk readers share: what is wrong with an image, and what its owner can do.
package verdict

import "fmt"

// Refused says that an image cannot be used as it is. Reason says what was found; Hint says what the image's owner
// can do about it. Both are meant for the owner's eyes: they hold no host paths.
type Refused struct {
	Reason string
	Hint   string
}

// Error gives the reason and the hint as one line.
func (e *Refused) Error() string {
	if e.Hint == "" {
		return e.Reason
	}
	return e.Reason + "; " + e.Hint
}

// Damaged is for contents that contradict themselves.
func Damaged(format string, args ...any) error {
	return &Refused{
		Reason: "the image is damaged: " + fmt.Sprintf(format, args...),
		Hint:   "check the file system on the machine it comes from (fsck) and upload the image again",
	}
}

// Cut is for contents that end too early.
func Cut(format string, args ...any) error {
	return &Refused{
		Reason: "the image is cut short: " + fmt.Sprintf(format, args...),
		Hint:   "upload the whole file again and compare its size and checksum",
	}
}

// Unsupported is for contents that are sound but not readable here.
func Unsupported(hint, format string, args ...any) error {
	return &Refused{Reason: fmt.Sprintf(format, args...), Hint: hint}
}

// Limit is for contents beyond what one image may hold.
func Limit(format string, args ...any) error {
	return &Refused{
		Reason: "the image is too large to unpack: " + fmt.Sprintf(format, args...),
		Hint:   "make the image smaller, or ask the operator to raise the limit",
	}
}
