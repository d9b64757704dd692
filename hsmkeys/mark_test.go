package hsmkeys

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/keyspec"
	"github.com/kmehsm/kmehsm/hsmkeys/p11"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

// A mark is there until the next one, for whoever has the user PIN; several who set one leave one, or theirs.
func TestMark(t *testing.T) {
	tok := softhsmtest.Operator(t)
	token := newOperatorOn(t, tok)
	marks := func() [][]byte {
		t.Helper()
		all, err := token.Marks(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	set := func(mark string) {
		t.Helper()
		if err := token.SetMark(t.Context(), []byte(mark), marks()); err != nil {
			t.Fatal(err)
		}
	}
	if all := marks(); len(all) != 0 {
		t.Errorf("a token that has none gives %q", all)
	}
	long := strings.Repeat("a mark of sixteen chains ", 80)
	for _, mark := range []string{"1", long, "3"} {
		set(mark)
		if all := marks(); len(all) != 1 || string(all[0]) != mark {
			t.Errorf("set %q, and got %q", mark, all)
		}
	}
	before := marks()
	var done sync.WaitGroup
	for i := range 8 {
		done.Go(func() {
			if err := token.SetMark(t.Context(), fmt.Append(nil, "of ", i), before); err != nil {
				t.Error(err)
			}
		})
	}
	done.Wait()
	if all := marks(); len(all) != 8 {
		t.Errorf("eight that did not know each other's marks left %q: a higher one may be lost", all)
	}
	set("last")
	if all := marks(); len(all) != 1 || !bytes.Equal(all[0], []byte("last")) {
		t.Errorf("the last one: %q", all)
	}

	// Whoever has no PIN can make an object that is not PRIVATE, under the same name: it is no mark, and stays what it
	// is.
	err := token.hsm.With(t.Context(), "forge", func(s *p11.Session) error {
		return s.PutNote(keyspec.MarkLabel, []byte("forged"), ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false)})
	})
	if err != nil {
		t.Fatal(err)
	}
	if all := marks(); len(all) != 1 || string(all[0]) != "last" {
		t.Errorf("beside an object that needs no PIN: %q", all)
	}
	set("last but one")
	if all := marks(); len(all) != 1 || string(all[0]) != "last but one" {
		t.Errorf("set beside an object that needs no PIN: %q", all)
	}
}

// Nobody sees a mark without a PIN.
func TestMarkIsPrivate(t *testing.T) {
	token := newOperator(t)
	if err := token.SetMark(t.Context(), []byte("1"), nil); err != nil {
		t.Fatal(err)
	}
	err := token.hsm.With(t.Context(), "look", func(s *p11.Session) error {
		found, err := s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_LABEL, keyspec.MarkLabel),
			ck.Attr(pkcs11.CKA_PRIVATE, false)})
		if len(found) > 0 {
			t.Error("a mark is an object that needs no PIN")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Derived keys are those of the ledger key and the purpose.
func TestDerive(t *testing.T) {
	one, two := newOperator(t), newOperator(t)
	derive := func(token *OperatorToken, purpose string) []byte {
		t.Helper()
		key, err := token.Derive(t.Context(), purpose)
		if err != nil {
			t.Fatal(err)
		}
		return key.Bytes()
	}
	rows := derive(one, "rows")
	if !bytes.Equal(rows, derive(one, "rows")) || bytes.Equal(rows, derive(one, "pages")) ||
		bytes.Equal(rows, derive(two, "rows")) {
		t.Error("a derived key is not that of its token and its purpose")
	}
	if _, err := one.Derive(t.Context(), "0123456789abcdef"); err == nil {
		t.Error("a purpose was taken whose name is as long as a KME")
	}
}

// again makes a call until it works, ten times at most. On a busy machine, a thread of SoftHSM that reads what another
// process has made may stand still for longer than a call waits for it; until then, no other thread sees that.
func again(call func() error) (err error) {
	for range 10 {
		if err = call(); err == nil {
			break
		}
	}
	return err
}

// A mark is there for whoever reads it at any moment, also while this process and another one replace it.
func TestMarkAtAnyMoment(t *testing.T) {
	replace := func(token *OperatorToken, enough func() bool) {
		for i := 0; !enough(); i++ {
			if err := again(func() error {
				all, err := token.Marks(t.Context())
				if err == nil {
					err = token.SetMark(t.Context(), fmt.Append(nil, i), all)
				}
				return err
			}); err != nil {
				t.Error(err)
				return
			}
		}
	}
	if uri := os.Getenv(childURI); uri != "" {
		token := must[*OperatorToken](t)(OpenOperator(t.Context(), uri, Options{}))
		defer token.Close()
		var stop atomic.Bool
		go func() {
			os.Stdin.Read(make([]byte, 1))
			stop.Store(true)
		}()
		replace(token, stop.Load)
		return
	}
	tok := softhsmtest.Operator(t)
	token := newOperatorOn(t, tok)
	if err := token.SetMark(t.Context(), []byte("first"), nil); err != nil {
		t.Fatal(err)
	}
	child := exec.Command(os.Args[0], "-test.run=^TestMarkAtAnyMoment$")
	child.Env = append(os.Environ(), childURI+"="+tok.URI)
	stop := must[io.WriteCloser](t)(child.StdinPipe())
	var out bytes.Buffer
	child.Stdout, child.Stderr = &out, &out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var reads atomic.Int64
	enough := func() bool { return reads.Load() >= 1000 || t.Failed() }
	var done sync.WaitGroup
	for range 4 {
		done.Go(func() {
			for !enough() {
				if err := again(func() error {
					all, err := token.Marks(t.Context())
					if err == nil && len(all) == 0 {
						err = errors.New("there is none")
					}
					return err
				}); err != nil {
					t.Errorf("read %d: %v", reads.Load(), err)
				}
				reads.Add(1)
			}
		})
	}
	replace(token, enough)
	done.Wait()
	stop.Close()
	if err := child.Wait(); err != nil {
		t.Errorf("%v: %s", err, out.Bytes())
	}
}
