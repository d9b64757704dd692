package custody

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/pty"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func echoes(t *testing.T, tty *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

// ask runs Ask, and types each text when it is asked for.
func ask(t *testing.T, q *Quorum, typed ...string) (said, seen string, err error) {
	t.Helper()
	person, program, err := pty.Open(80)
	must.Do(t, err)
	defer person.Close()
	defer program.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out testproc.Log
	done := make(chan error, 1)
	go func() { done <- q.Ask(ctx, program, &out) }()
	for i, text := range typed {
		testproc.Await(t, "question", func() bool {
			return strings.Count(out.String(), "press Enter") == i+1 && !echoes(t, program)
		})
		if text == "interrupt" {
			cancel()
			break
		}
		if _, err := person.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case err = <-done:
	case <-time.After(testproc.Patience):
		t.Fatalf("it still asks: %s", out.String())
	}
	if !echoes(t, program) {
		t.Error("the terminal shows nothing any more")
	}
	fd, b := int(person.Fd()), make([]byte, 64<<10)
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	n, _ := unix.Read(fd, b) // fails if nothing was shown
	return out.String(), string(b[:max(n, 0)]), err
}

func TestAsk(t *testing.T) {
	pin, shares := split(t, "0123", 3, 5)
	_, others := split(t, "0123", 3, 5)
	var text []string
	for _, s := range append(shares, others[0]) {
		b, err := s.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, string(b))
	}
	q := &Quorum{Token: "0123", Splits: []hsmkeys.Split{shares[0].Split.Split}}
	said, seen, err := ask(t, q, text[1], "nonsense\n", text[1], "\n", text[5], text[4], text[0])
	if err != nil {
		t.Fatal(err)
	}
	if got, err := q.PIN(); err != nil || string(got) != pin || fmt.Sprint(q.Indexes()) != "[2 5 1]" {
		t.Errorf("%v of shares %v", err, q.Indexes())
	}
	for _, want := range []string{
		"Share 1 of the 3 that are needed, of split " + shares[0].ID + ", by any custodian.",
		"Taken: share 2 of", "Not taken: it is no share", "Not taken: share 2 of split " + shares[0].ID +
			" was given twice",
		"Not taken: share 1 of split " + others[0].ID + " is of another split",
		"Share 3 of the 3 that are needed, of split " + shares[0].ID + ", by any custodian but 2, 5.",
		"Taken: share 1 of",
	} {
		if !strings.Contains(said, want) {
			t.Errorf("it does not say %q", want)
		}
	}
	if strings.Contains(said+seen, "kme-so-share") {
		t.Error("a share is shown")
	}

	q = &Quorum{Token: "0123", Splits: []hsmkeys.Split{shares[0].Split.Split}}
	if _, _, err := ask(t, q, text[0], "interrupt"); err == nil ||
		!strings.Contains(err.Error(), "not enough shares, and no PIN was tried") {
		t.Errorf("interrupted: %v", err)
	}
	nobody := must.Get[*os.File](t)(os.Open(os.DevNull))
	defer nobody.Close()
	if err := new(Quorum).Ask(t.Context(), nobody, new(testproc.Log)); err == nil {
		t.Error("asked where there is no terminal")
	}
}
