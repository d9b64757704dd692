package hsmkeys

import (
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/kmehsm/kmehsm/hsmkeys/keyop"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
	"github.com/kmehsm/kmehsm/kme"
)

// Another process makes a storage key, and this one looks when the key's file is still empty: it finds the key all the
// same.
func TestUnseenKey(t *testing.T) {
	if uri := os.Getenv(childURI); uri != "" {
		token := must[*OperatorToken](t)(OpenOperator(t.Context(), uri, Options{}))
		defer token.Close()
		must[bool](t)(token.makeStorage(t.Context(), keyspec.StorageGeneration(2)))
		sealed := must[[]byte](t)(p11.Do(t.Context(), token.hsm, "test", func(s *p11.Session) ([]byte, error) {
			generation, h, err := token.newestStorage(s)
			if err != nil {
				return nil, err
			}
			return keyop.Seal(s, generation, h, kme.RandomSecret())
		}))
		os.Stdout.WriteString("sealed " + hex.EncodeToString(sealed) + "\n")
		return
	}
	tok := softhsmtest.Token(t)
	token := newOperatorOn(t, tok)
	objects := func() map[string]bool {
		all := map[string]bool{}
		for _, file := range must[[]string](t)(filepath.Glob(filepath.Join(softhsmtest.Dir(), "*", "*", "*.object"))) {
			all[file] = true
		}
		return all
	}
	before := objects()
	cmd := exec.Command(os.Args[0], "-test.run=^TestUnseenKey$")
	cmd.Env = append(os.Environ(), childURI+"="+tok.URI)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	_, text, _ := strings.Cut(string(out), "sealed ")
	text, _, _ = strings.Cut(text, "\n")
	sealed := must[[]byte](t)(hex.DecodeString(text))
	written := map[string][]byte{}
	for file := range objects() {
		if !before[file] {
			written[file] = must[[]byte](t)(os.ReadFile(file))
			if err := os.Truncate(file, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(written) == 0 {
		t.Fatal("the key is in no file")
	}
	if _, err := token.EncryptRANDs(t.Context(), sealed, make([]RAND, 1)); !errors.Is(err, ErrNoKey) {
		t.Fatalf("a key that is not there: %v", err)
	}
	read := make(chan struct{})
	looked := sync.OnceFunc(func() { close(read) })
	var there sync.WaitGroup
	var whole atomic.Bool
	there.Go(func() {
		defer whole.Store(true)
		<-read
		for file, data := range written {
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Error(err)
			}
		}
	})
	pool := p11.NewPool(token)
	for last := false; !last; { // on a busy machine the files may come later than OnAny waits for them
		last = whole.Load()
		_, err := p11.OnAny(t.Context(), pool, func(token *OperatorToken) ([]RAND, error) {
			out, err := token.EncryptRANDs(t.Context(), sealed, make([]RAND, 1))
			if errors.Is(err, ErrNoKey) {
				looked()
			}
			return out, err
		})
		if err == nil {
			break
		}
		if last || !errors.Is(err, ErrNoKey) {
			t.Fatalf("a key that is there: %v", err)
		}
	}
	there.Wait()
	if _, err := token.EncryptRANDs(t.Context(), sealed, make([]RAND, 1)); err != nil {
		t.Fatal(err)
	}
}
