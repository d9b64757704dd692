// Package pinsource reads PINs from files.
package pinsource

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A PIN is a user's or a security officer's. Printed, it shows nothing of the PIN.
type PIN string

const redacted = "[PIN]"

func (PIN) String() string               { return redacted }
func (PIN) GoString() string             { return redacted }
func (PIN) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (PIN) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (PIN) Format(f fmt.State, _ rune)   { io.WriteString(f, redacted) }

// Read takes a PIN from a pin-source: a file: URI or an absolute path (RFC 7512 section 2.4). One newline at the
// end belongs to the file, not to the PIN. Its errors never quote the file's content.
func Read(source string) (_ PIN, err error) {
	defer func() { err = usage.Mark(err) }()
	if source == "" {
		return "", errors.New("no PIN: add pin-source=file:/path to the token's URI")
	}
	path := source
	if rest, ok := strings.CutPrefix(source, "file:"); ok {
		p, err := url.PathUnescape(strings.TrimPrefix(rest, "//"))
		if err != nil {
			return "", errors.New("the pin-source is no valid file: URI")
		}
		path = p
	}
	if !filepath.IsAbs(path) {
		// It may be the PIN itself.
		return "", errors.New("the pin-source is neither file:/path nor an absolute path")
	}
	switch info, err := os.Stat(path); {
	case err != nil:
		return "", fmt.Errorf("the PIN cannot be read: %w", err)
	case info.IsDir():
		return "", fmt.Errorf("the PIN file %s is a folder: name the file in it", path)
	case durable.Closed(path, info) != nil:
		return "", fmt.Errorf("the PIN file %w: chmod 0600 it, and change the PIN if others had access",
			durable.Closed(path, info))
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("the PIN cannot be read: %w", err)
	}
	pin := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if pin == "" {
		return "", fmt.Errorf("the PIN file %s is empty", path)
	}
	return PIN(pin), nil
}
