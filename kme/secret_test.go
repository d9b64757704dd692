package kme

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// Whatever is done to print a secret, its bytes do not come out.
func TestSecretIsNotPrinted(t *testing.T) {
	s, err := NewSecret(bytes.Repeat([]byte{0xA7}, SecretSize))
	if err != nil {
		t.Fatal(err)
	}
	p := Plaintext{KME: s, RME: s}
	var out bytes.Buffer
	for _, verb := range "vsqxXdbocUteEfFgGp" {
		for _, flags := range []string{"", "+", "#", " ", "0", "-"} {
			for _, v := range []any{s, &s, []Secret{s}, map[string]Secret{"k": s}, p.KME, struct{ S Secret }{s}, p,
				&p} {
				fmt.Fprintf(&out, "%"+flags+string(verb)+"\n", v)
			}
		}
	}
	b, err := json.Marshal(map[string]any{"s": s, "p": &s, "kme": p.KME})
	if err != nil {
		t.Fatal(err)
	}
	out.Write(b)
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("m", "s", s, "p", &s, "list", []Secret{s})
	}
	if !strings.Contains(out.String(), redacted) {
		t.Error("nothing was printed, so that this test sees nothing")
	}
	for _, form := range []string{"\xa7\xa7", "a7a7", "A7A7", "167 167", "167, 167", "a7 a7", "A7 A7", "p6en",
		"247247", "10100111"} {
		if strings.Contains(out.String(), form) {
			t.Errorf("the secret came out as %q", form)
		}
	}
}

func TestSecret(t *testing.T) {
	for _, n := range []int{0, 31, 33} {
		if _, err := NewSecret(make([]byte, n)); err == nil {
			t.Errorf("a secret of %d bytes", n)
		}
	}
	from := bytes.Repeat([]byte{1}, SecretSize)
	s, err := NewSecret(from)
	if err != nil {
		t.Fatal(err)
	}
	from[0] = 2
	if s.Bytes()[0] != 1 {
		t.Error("a secret shares memory with what it was made from")
	}
	same, _ := NewSecret(bytes.Repeat([]byte{1}, SecretSize))
	if !s.Equal(same) || s.Equal(RandomSecret()) || s.Equal(Secret{}) || (Secret{}).Equal(Secret{}) {
		t.Error("Equal is wrong")
	}
	copied := s
	s.Wipe()
	if !bytes.Equal(copied.Bytes(), make([]byte, SecretSize)) {
		t.Error("a copy was not wiped")
	}
	Secret{}.Wipe()
}
