package auditlog

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func newSigner(t *testing.T) *directory.Signer {
	t.Helper()
	return must(directory.NewSigner(must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))))
}

func TestLog(t *testing.T) {
	signer := newSigner(t)
	verifier := directory.NewVerifier(signer.Public())
	log := Log{Dir: filepath.Join(t.TempDir(), "state")}
	entry := func(result string) *Head {
		t.Helper()
		return must(log.Append([]string{"factory", "lot", "list"}, "0123", result))
	}
	for range 3 {
		entry(Begun)
		if err := log.Sign(signer, entry(Done)); err != nil {
			t.Fatal(err)
		}
	}
	killed := entry(Begun)
	entry(Begun)
	if err := log.Sign(signer, entry("it failed")); err != nil {
		t.Fatal(err)
	}
	entry(Begun) // still at work
	r, err := log.Verify(verifier)
	if err != nil || r.Lines != 10 || r.Signed != 9 || len(r.Interrupted) != 2 || r.Interrupted[0].Seq != killed.Seq ||
		r.Interrupted[1].Seq != 10 {
		t.Fatalf("%+v, %v", r, err)
	}
	if e := r.Interrupted[0]; e.Token != "0123" || !slices.Equal(e.Command, []string{"factory", "lot", "list"}) ||
		e.Who == "" || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	path, head := filepath.Join(log.Dir, File), filepath.Join(log.Dir, headFile)
	if info := must(os.Stat(path)); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
	whole, signed := must(os.ReadFile(path)), must(os.ReadFile(head))
	lines := bytes.SplitAfter(bytes.TrimSuffix(whole, []byte("\n")), []byte("\n"))
	lines[9] = append(lines[9], '\n')
	without := func(i int) []byte { return bytes.Join(slices.Delete(slices.Clone(lines), i, i+1), nil) }
	for name, c := range map[string]struct {
		log  []byte
		want string
	}{
		"a line changed": {bytes.Replace(whole, []byte(`"it failed"`), []byte(`"done"`), 1), "line 10"},
		"the signed line changed": {bytes.Replace(bytes.Join(lines[:9], nil), []byte(`"it failed"`),
			[]byte(`"done"`), 1), "line 9"},
		"the first line removed": {without(0), "line 1,"},
		"a line removed":         {without(4), "line 5,"},
		"lines swapped": {slices.Concat(lines[0], lines[2], lines[1], bytes.Join(lines[3:], nil)),
			"line 2,"},
		"a line twice":             {slices.Concat(lines[0], lines[0], bytes.Join(lines[1:], nil)), "line 2,"},
		"lines removed at the end": {bytes.Join(lines[:8], nil), "removed at its end"},
		"all removed":              {nil, "removed at its end"},
		"an unknown field": {bytes.Replace(whole, []byte(`{"seq":1,`), []byte(`{"seq":1,"x":1,`), 1),
			"line 1 is no line"},
		"what is no JSON":         {append(bytes.Clone(whole), "hello\n"...), "line 11 is no line"},
		"a whole chain made anew": {anew(t, 12), "not the one that the token has signed"},
		"a line as long as no line": {append(bytes.Clone(whole), bytes.Repeat([]byte("x"), 2*maxEntry)...),
			"too long"},
		"another line with its digit": {bytes.Replace(whole, []byte(`"seq":3,`), []byte(`"seq":4,`), 1), "line 3,"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, c.log, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := log.Verify(verifier); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v does not say %q", err, c.want)
			}
		})
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("the signature changed", func(t *testing.T) {
		defer os.WriteFile(head, signed, 0o600)
		other := bytes.Clone(signed)
		other[len(other)/2] ^= 1
		if err := os.WriteFile(head, other, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := log.Verify(verifier); err == nil {
			t.Error("accepted")
		}
	})
	// A crash in the middle of a line: the line never counted, and the next one takes its place. A command that is at
	// work meanwhile can sign.
	if err := os.WriteFile(path, append(bytes.Clone(whole), lines[0][:20]...), 0o600); err != nil {
		t.Fatal(err)
	}
	if r, err := log.Verify(verifier); err != nil || r.Lines != 10 || r.Signed != 9 {
		t.Errorf("%+v, %v", r, err)
	}
	tenth := &Head{Seq: 10, SHA256: lineDigest(bytes.TrimSuffix(lines[9], []byte("\n")))}
	if err := log.Sign(signer, tenth); err != nil {
		t.Error(err)
	}
	if err := log.Sign(signer, entry(Done)); err != nil {
		t.Fatal(err)
	}
	if r, err := log.Verify(verifier); err != nil || r.Lines != 11 || r.Signed != 11 || len(r.Interrupted) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
}

// What somebody has made of a log is not signed with the next command.
func TestSignNotAnew(t *testing.T) {
	signer := newSigner(t)
	log := Log{Dir: t.TempDir()}
	path, head := filepath.Join(log.Dir, File), filepath.Join(log.Dir, headFile)
	entry := func(result string) *Head { return must(log.Append([]string{"factory", "init"}, "0123", result)) }
	entry(Begun)
	entry("it failed") // before there was a key, and so unsigned
	entry(Begun)
	if err := log.Sign(signer, entry(Done)); err != nil {
		t.Fatal(err)
	}
	whole, signed := must(os.ReadFile(path)), must(os.ReadFile(head))
	other := func() error { return os.WriteFile(path, anew(t, 9), 0o600) }
	for name, lose := range map[string]func() error{
		"another chain":                   other,
		"another chain, and no signature": func() error { return errors.Join(other(), os.Remove(head)) },
		"another chain, and another's signature": func() error {
			return errors.Join(other(), os.WriteFile(head, must(newSigner(t).Sign(typeHead, entry(Done))), 0o600))
		},
		"a shorter chain": func() error { return os.WriteFile(path, anew(t, 1), 0o600) },
	} {
		if err := lose(); err != nil {
			t.Fatal(err)
		}
		if err := log.Sign(signer, entry(Done)); err == nil {
			t.Errorf("%s: it is signed", name)
		}
		for at, data := range map[string][]byte{path: whole, head: signed} {
			if err := os.WriteFile(at, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		entry(Begun)
		if err := log.Sign(signer, entry(Done)); err != nil {
			t.Errorf("%s: what is brought back is not signed: %v", name, err)
		}
	}
}

// The first command is ended at its signature, by a crash or a full disk: the next one is recorded all the same.
func TestFirstSignatureFails(t *testing.T) {
	signer := newSigner(t)
	for fails := 1; fails <= 3; fails++ {
		log, calls := Log{Dir: t.TempDir()}, 0
		record := func() error {
			return log.Record([]string{"factory", "init"}, "0123", func() error { return nil }, func(h *Head) error {
				if calls++; calls == fails {
					return errors.New("full")
				}
				return log.Sign(signer, h)
			})
		}
		if first, second := record(), record(); first == nil && second == nil {
			t.Errorf("signature %d does not fail", fails)
		}
		if err := record(); err != nil {
			t.Errorf("after signature %d failed: %v", fails, err)
		}
		if _, err := log.Verify(directory.NewVerifier(signer.Public())); err != nil {
			t.Error(err)
		}
	}
}

// Neither the error of a command that fails, nor that of the log, hides the other.
func TestRecordTellsBoth(t *testing.T) {
	failed, full := errors.New("it failed"), errors.New("full")
	for _, c := range []struct{ command, sign error }{{nil, nil}, {nil, full}, {failed, nil}, {failed, full}} {
		err := Log{Dir: t.TempDir()}.Record([]string{"factory", "init"}, "0123", func() error { return c.command },
			func(*Head) error { return c.sign })
		if errors.Is(err, failed) != (c.command != nil) || errors.Is(err, full) != (c.sign != nil) {
			t.Errorf("%v and %v: %v", c.command, c.sign, err)
		}
	}
}

// The text of an error may be longer than an entry, whatever its characters are in JSON.
func TestRecordCutsError(t *testing.T) {
	for _, text := range []string{"x", "<", "ü", "\n"} {
		log := Log{Dir: t.TempDir()}
		failed := errors.New(strings.Repeat(text, 2*maxEntry))
		err := log.Record([]string{"factory", "lot", "refresh"}, "", func() error { return failed },
			func(*Head) error { return nil })
		if err != failed {
			t.Errorf("%q: the error is another: %.100s", text, err)
		}
		_, entries, err := log.read()
		if err != nil || len(entries) != 2 {
			t.Fatalf("%q: %d entries, %v", text, len(entries), err)
		}
		result, cut := strings.CutSuffix(entries[1].Result, "... (cut)")
		if !cut || len(result) < 1000 || !strings.HasPrefix(failed.Error(), result) {
			t.Errorf("%q: %.100q", text, entries[1].Result)
		}
	}
}

// anew is a log that is a chain, but not the one that was signed.
func anew(t *testing.T, n int) []byte {
	t.Helper()
	log := Log{Dir: t.TempDir()}
	for range n {
		must(log.Append([]string{"other"}, "", Done))
	}
	return must(os.ReadFile(filepath.Join(log.Dir, File)))
}

// Many at once, with lines of all lengths: still one chain.
func TestLogConcurrently(t *testing.T) {
	log := Log{Dir: t.TempDir()}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 10 {
				if _, err := log.Append([]string{strings.Repeat("x", i*j*100)}, "", Done); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if digests, _, err := log.read(); err != nil || len(digests) != 80 {
		t.Error(len(digests), err)
	}
	if _, err := log.Append([]string{strings.Repeat("x", maxEntry)}, "", Done); err == nil {
		t.Error("a line that could not be read again was written")
	}
}

// A log that is not ours is refused, and never panics.
func FuzzReadLog(f *testing.F) {
	log := Log{Dir: f.TempDir()}
	for range 3 {
		must(log.Append([]string{"factory", "init"}, "1", Begun))
	}
	f.Add(must(os.ReadFile(filepath.Join(log.Dir, File))))
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		log := Log{Dir: t.TempDir()}
		if err := os.WriteFile(filepath.Join(log.Dir, File), data, 0o600); err != nil {
			t.Fatal(err)
		}
		before, _, err := log.read()
		if err != nil {
			return
		}
		// What reads as a chain can be appended to, and is one still.
		must(log.Append(nil, "", Done))
		if after, _, err := log.read(); err != nil || len(after) != len(before)+1 {
			t.Errorf("%d lines became %d: %v", len(before), len(after), err)
		}
	})
}
