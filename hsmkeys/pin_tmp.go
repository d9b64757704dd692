package hsmkeys

import (
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/miekg/pkcs11"
)

type PIN string

const redactedPIN = "[PIN]"

func (PIN) String() string               { return redactedPIN }
func (PIN) GoString() string             { return redactedPIN }
func (PIN) LogValue() slog.Value         { return slog.StringValue(redactedPIN) }
func (PIN) MarshalText() ([]byte, error) { return []byte(redactedPIN), nil }
func (PIN) Format(f fmt.State, _ rune)   { io.WriteString(f, redactedPIN) }

func ReadPIN(source string) (PIN, error) {
	p, err := readPIN(source)
	return PIN(p), err
}

func (s *session) findObjects(template attributes) (all []pkcs11.ObjectHandle, err error) {
	if err := s.FindObjectsInit(s.h, template); err != nil {
		return nil, err
	}
	for {
		found, _, err := s.FindObjects(s.h, 100)
		if all = append(all, found...); err != nil || len(found) == 0 {
			return all, errors.Join(err, s.FindObjectsFinal(s.h))
		}
	}
}
