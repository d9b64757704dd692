package revocations

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// A notes is a Ledger that keeps the last detail of each subject, and whose it was.
type notes struct {
	details map[string]string
	actor   binding.Actor
	err     error
}

func (n *notes) Note(ctx context.Context, event binding.Event, subject, detail string) error {
	n.details[string(event)+" "+subject], n.actor = detail, binding.ActorOf(ctx)
	return n.err
}

func (n *notes) LastNote(_ context.Context, event binding.Event, subject string) (string, bool, error) {
	detail, found := n.details[string(event)+" "+subject]
	return detail, found, n.err
}

// What is noted of a lot's list is known after a restart: of this lot alone, and of this manufacturer's.
func TestMarks(t *testing.T) {
	ledger, dir := &notes{details: map[string]string{}}, t.TempDir()
	caller := binding.WithActor(t.Context(), binding.Actor{Client: "hss"})
	want := directory.ListMark{Version: 7, SHA256: []byte{1, 2, 3}}
	if err := Memory(ledger, "maker", dir).Note(caller, "L1", want); err != nil {
		t.Fatal(err)
	}
	if ledger.actor != (binding.Actor{}) {
		t.Errorf("the entry is %v's, want the service's own", ledger.actor)
	}
	for _, c := range []struct {
		manufacturer, lot string
		found             bool
	}{{"maker", "L1", true}, {"maker", "L2", false}, {"another", "L1", false}} {
		got, found, err := Memory(ledger, c.manufacturer, dir).Last(caller, c.lot)
		if err != nil || found != c.found || found && (got.Version != 7 || !bytes.Equal(got.SHA256, want.SHA256)) {
			t.Errorf("%+v: %+v, %v, %v", c, got, found, err)
		}
	}
}

// An entry that this does not understand, or a ledger that cannot be read, is an error, and no list that was never
// there.
func TestMarksUnreadable(t *testing.T) {
	key := string(binding.EventRevocations) + " " + binding.RevocationsSubject("maker", "L1")
	for _, c := range []struct {
		detail string
		err    error
		says   string
	}{
		{"", nil, key[len(binding.EventRevocations)+1:]},
		{`{"version":"seven"}`, nil, "the ledger's last entry"},
		{`{"version":7,"sha256":"AQID","more":1}`, nil, "the ledger's last entry"},
		{`{"version":7,"sha256":"AQID"}`, errors.New("away"), "away"},
	} {
		ledger := &notes{map[string]string{key: c.detail}, binding.Actor{}, c.err}
		_, _, err := Memory(ledger, "maker", t.TempDir()).Last(t.Context(), "L1")
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, want %q", c.detail, err, c.says)
		}
	}
}

// Whoever only reads knows what was noted, and notes and keeps nothing for others.
func TestReadOnly(t *testing.T) {
	ledger, dir := &notes{details: map[string]string{}}, t.TempDir()
	service, reader := Memory(ledger, "maker", dir), ReadOnly(ledger, "maker", dir)
	check := func(m directory.Memory, want int) {
		t.Helper()
		if got, _, err := m.Last(t.Context(), "L1"); err != nil || got.Version != want {
			t.Errorf("%+v, %v, want version %d", got, err, want)
		}
		if kept, err := m.Kept("L1"); err != nil || string(kept) != "7" {
			t.Errorf("%q, %v", kept, err)
		}
	}
	must.Do(t, service.Note(t.Context(), "L1", directory.ListMark{Version: 7}))
	must.Do(t, service.Keep("L1", []byte("7")))
	check(reader, 7)
	must.Do(t, reader.Note(t.Context(), "L1", directory.ListMark{Version: 8}))
	must.Do(t, reader.Keep("L1", []byte("8")))
	check(service, 7)
	check(reader, 8)
	check(ReadOnly(ledger, "maker", dir), 7)
}

// Copies are of one manufacturer's lots; one that was never kept is fs.ErrNotExist.
func TestCopies(t *testing.T) {
	dir := t.TempDir()
	for _, list := range []string{"first", "second"} { // replaces it
		if err := Memory(nil, "maker", dir).Keep("L1", []byte(list)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Memory(nil, "maker", dir).Kept("L1"); err != nil || string(got) != "second" {
		t.Errorf("%q, %v", got, err)
	}
	for _, of := range [][2]string{{"maker", "L2"}, {"another", "L1"}} {
		if got, err := Memory(nil, of[0], dir).Kept(of[1]); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v: %q, %v", of, got, err)
		}
	}
}
