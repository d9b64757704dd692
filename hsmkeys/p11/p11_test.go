package p11

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/hsmkeys/pinsource"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 16) }

func openToken(t testing.TB, tok softhsmtest.Tok, o Options) *Token {
	t.Helper()
	token, err := OpenUser(t.Context(), tok.URI, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := token.Close(); err != nil {
			t.Error(err)
		}
	})
	return token
}

// Another process logs in at this moment: SoftHSM has emptied the token's file, and writes it anew.
func TestOpenWhileAnotherLogsIn(t *testing.T) {
	tok := softhsmtest.Token(t)
	file := filepath.Join(filepath.Dir(tok.PINFile), "tokens", tok.Label, "token.object")
	whole := must.Get[[]byte](t)(os.ReadFile(file))
	login := func() (end func()) {
		must.Do(t, os.Truncate(file, 0))
		written := make(chan error)
		time.AfterFunc(30*time.Millisecond, func() { written <- os.WriteFile(file, whole, 0o600) })
		return func() { must.Do(t, <-written) }
	}
	for who, open := range map[string]func() error{
		"the user": func() error {
			token, err := OpenUser(t.Context(), tok.URI, Options{})
			if err != nil {
				return err
			}
			return token.Close()
		},
		"the security officer": func() error {
			return AsOfficer(tok.URI, pinsource.PIN(tok.SOPIN), func(*Token) error { return nil })
		},
	} {
		var err error
		for range 10 { // on a busy machine the file may come later than it is waited for
			end := login()
			err = open()
			end()
			if err == nil {
				break
			}
		}
		if err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
}

// SoftHSM is reinitialised now and then: it keeps a part of each session object until then.
func TestSoftHSMIsRenewed(t *testing.T) {
	tok := softhsmtest.Token(t)
	if n := openToken(t, tok, Options{}).renewal.after.Load(); n != softHSMRenewal {
		t.Errorf("after %d uses", n)
	}
	token := openToken(t, tok, Options{RenewAfter: 5})
	before := token.Epoch()
	for range 5 {
		if err := ping(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "it is reinitialised", func() bool { return token.Epoch() != before })
}

// find looks for objects of a label.
func find(ctx context.Context, token *Token, label string) (n int, err error) {
	found, err := Do(ctx, token, "find", func(s *Session) ([]pkcs11.ObjectHandle, error) {
		return s.Find(ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true), ck.Attr(pkcs11.CKA_LABEL, label)})
	})
	return len(found), err
}

// ping shows that the token can work.
func ping(ctx context.Context, token *Token) error {
	return token.With(ctx, "ping", func(s *Session) error {
		h, err := s.Generate(pkcs11.CKM_AES_KEY_GEN, ck.InSession(ck.Use(ck.Usages), ck.Guarded(false),
			ck.Attributes{ck.Attr(pkcs11.CKA_VALUE_LEN, 32)}))
		if err != nil {
			return err
		}
		return s.Destroy(h)
	})
}

func countObjects(t *testing.T, token *Token) int {
	t.Helper()
	all, err := Do(context.Background(), token, "test", func(s *Session) ([]pkcs11.ObjectHandle, error) {
		return s.Find(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// The module gives its function list again, for all tokens but those behind p11-kit: see ck.FunctionsOf.
func TestFunctionList(t *testing.T) {
	client, err := filepath.Glob("/usr/lib/*/pkcs11/p11-kit-client.so")
	if err != nil || len(client) != 1 {
		t.Fatalf("p11-kit-client.so: %v, %v: scripts/deps.sh test installs it", client, err)
	}
	for path, same := range map[string]bool{softhsmtest.ModulePath(): true, softhsmtest.NSS(t).Module: true,
		client[0]: false} {
		one, other := pkcs11.New(path), pkcs11.New(path)
		if one == nil || other == nil {
			t.Fatalf("%s cannot be loaded", path)
		}
		defer one.Destroy()
		defer other.Destroy()
		got := must.Get[ck.Functions](t)(ck.FunctionsOf(one)) == must.Get[ck.Functions](t)(ck.FunctionsOf(other))
		if got != same {
			t.Errorf("%s gives the same list: %v, want %v", path, got, same)
		}
	}
}

// holdAll takes all sessions of a token, until free gives them back.
func holdAll(token *Token) (free func()) {
	freed := make(chan struct{})
	var taken, done sync.WaitGroup
	for range token.Sessions() {
		taken.Add(1)
		done.Go(func() {
			token.With(context.Background(), "hold", func(*Session) error { taken.Done(); <-freed; return nil })
		})
	}
	taken.Wait()
	return func() {
		close(freed)
		done.Wait()
	}
}

func TestSessions(t *testing.T) {
	token := openToken(t, softhsmtest.Operator(t), Options{})
	t.Run("a caller that has gone", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := ping(ctx, token); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	t.Run("all sessions taken", func(t *testing.T) {
		free := holdAll(token)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := ping(ctx, token); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
		free()
		if err := ping(t.Context(), token); err != nil {
			t.Error(err)
		}
	})
	t.Run("a failed call does not spoil its session", func(t *testing.T) {
		for range 2 * token.Sessions() {
			err := token.With(t.Context(), "test", func(s *Session) error { // leaves a search active
				if err := s.Ctx.FindObjectsInit(s.ID, nil); err != nil {
					return err
				}
				return pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)
			})
			if !ck.IsCKR(err, pkcs11.CKR_ARGUMENTS_BAD) {
				t.Fatal(err)
			}
		}
		if n, err := find(t.Context(), token, "never made"); n != 0 || err != nil {
			t.Error(n, err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	tok := softhsmtest.Token(t)
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		os.Chmod(path, mode)
		return path
	}
	base := "pkcs11:token=" + tok.Label + "?module-path=" + tok.Module
	for name, c := range map[string]struct{ uri, want string }{
		"no URI":          {"", "name one, here or in KMEHSM_TOKEN"},
		"no PKCS #11 URI": {"http://x", "RFC 7512"},
		"garbage":         {"pkcs11:%zz", "RFC 7512"},
		"no module":       {"pkcs11:token=x", "module-path"},
		"missing module":  {"pkcs11:token=x?module-path=/nowhere.so&pin-source=" + tok.PINFile, "/nowhere.so"},
		"no library": {"pkcs11:token=x?module-path=" + tok.PINFile + "&pin-source=" + tok.PINFile,
			"cannot be used"},
		"no token named": {"pkcs11:?module-path=" + tok.Module, "token=LABEL"},
		"missing token":  {"pkcs11:token=nope?module-path=" + tok.Module + "&pin-source=" + tok.PINFile, "nope"},
		"wrong serial": {"pkcs11:token=" + tok.Label + ";serial=00?module-path=" + tok.Module + "&pin-source=" +
			tok.PINFile, "serial"},
		"pin-value":    {base + "&pin-value=" + tok.PIN, "pin-source"},
		"no PIN":       {base, "pin-source"},
		"missing PIN":  {base + "&pin-source=file:/nowhere/pin", "/nowhere/pin"},
		"relative PIN": {base + "&pin-source=pin", "absolute"},
		"PIN itself":   {base + "&pin-source=" + tok.PIN, "absolute"},
		"PIN as file":  {base + "&pin-source=file:" + tok.PIN, "absolute"},
		"empty PIN":    {base + "&pin-source=" + file("empty", "\n", 0o600), "empty"},
		"open PIN":     {base + "&pin-source=" + file("open", tok.PIN, 0o644), "chmod 0600"},
		"PIN folder":   {base + "&pin-source=file:" + dir, "is a folder: name the file in it"},
		"wrong PIN":    {base + "&pin-source=" + file("wrong", tok.PIN+"9", 0o600), "refused the PIN"},
	} {
		t.Run(name, func(t *testing.T) {
			token, err := OpenUser(t.Context(), c.uri, Options{})
			if err == nil {
				token.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%q does not say %q", err, c.want)
			}
			if strings.Contains(err.Error(), tok.PIN) {
				t.Errorf("the error shows the PIN: %v", err)
			}
		})
	}
	// pin-source may end in a newline, and have file: or not.
	for _, source := range []string{"file:" + file("nl", tok.PIN+"\n", 0o600), file("crlf", tok.PIN+"\r\n", 0o400),
		"file://" + file("plain", tok.PIN, 0o600)} {
		token, err := OpenUser(t.Context(), base+"&pin-source="+source, Options{})
		if err != nil {
			t.Error(source, err)
			continue
		}
		token.Close()
	}
	err := AsOfficer(tok.URI, pinsource.PIN(tok.PIN), func(*Token) error { return nil })
	if err == nil || !strings.Contains(err.Error(), "refused the PIN") {
		t.Errorf("a wrong security officer's PIN: %v", err)
	}
}

// What keeps a key is left out for no less than a token that never takes it: not for a fault that passes, and not for a
// refusal of something else.
func TestNothingIsLeftOutInVain(t *testing.T) {
	lost := map[string]uint32{"SoftHSM": 0, "NSS": 1<<len(ck.Optional) - 1}
	for name, tok := range map[string]softhsmtest.Tok{"SoftHSM": softhsmtest.Token(t), "NSS": softhsmtest.NSS(t)} {
		t.Run(name, func(t *testing.T) {
			token := openToken(t, tok, Options{})
			if lacks := token.lacks.Load(); lacks != 0 {
				t.Errorf("lacks %b before anything was made", lacks)
			}
			err := token.With(t.Context(), "test", func(s *Session) error {
				h, err := s.Generate(pkcs11.CKM_AES_KEY_GEN, ck.Join(ck.Use(ck.Usages), ck.Guarded(false),
					ck.Mechanisms(pkcs11.CKM_AES_ECB), ck.Attributes{ck.Attr(pkcs11.CKA_TOKEN, true),
						ck.Attr(pkcs11.CKA_VALUE_LEN, 32)}))
				if err != nil {
					return err
				}
				return errors.Join(s.Destroy(h), s.PutNote("test", []byte("x"),
					ck.Attributes{ck.Attr(pkcs11.CKA_PRIVATE, false), ck.Attr(pkcs11.CKA_DESTROYABLE, false)}))
			})
			if err != nil {
				t.Fatal(err)
			}
			lacks, objects := token.lacks.Load(), countObjects(t, token)
			if lacks != lost[name] || objects != 1 {
				t.Errorf("lacks %b, want %b; %d objects of a note", lacks, lost[name], objects)
			}
			for _, refusal := range append(ck.Refused, pkcs11.CKR_MECHANISM_INVALID) {
				var asked []ck.Attributes
				err := token.With(t.Context(), "test", func(s *Session) error {
					_, err := s.Fitting(ck.Frozen(ck.Guarded(false)),
						func(a ck.Attributes) (pkcs11.ObjectHandle, error) {
							asked = append(asked, a)
							return 0, refusal
						})
					if !ck.IsCKR(err, refusal) {
						t.Errorf("%v: %v", refusal, err)
					}
					return nil
				})
				if err != nil || len(asked) != 1 {
					t.Errorf("%v: asked %d times, %v", refusal, len(asked), err)
				}
			}
			if now, left := token.lacks.Load(), countObjects(t, token); now != lacks || left != objects {
				t.Errorf("lacks %b, before %b; %d objects, before %d", now, lacks, left, objects)
			}
		})
	}
}
