// Package revocations remembers the last good lists of revoked devices, so that none is replaced by an earlier one,
// even after a restart.
package revocations

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// A Ledger is what a memory needs of binding.Ledger.
type Ledger interface {
	Note(ctx context.Context, event binding.Event, subject, detail string) error
	LastNote(ctx context.Context, event binding.Event, subject string) (detail string, found bool, err error)
}

// Memory keeps marks of a manufacturer's last good lists in the ledger, and copies of the lists in a folder, which it
// verifies by their digests in the ledger. The actor of its entries is the service itself. Of two instances that note
// two lists at the same time, the one with the earlier list may be the last: the other's next read notes the later one.
func Memory(ledger Ledger, manufacturer, dir string) directory.Memory {
	return memory{Ledger: ledger, manufacturer: manufacturer, dir: filepath.Join(dir, manufacturer)}
}

type memory struct {
	Ledger
	manufacturer, dir string
}

func (m memory) file(lot string) string { return filepath.Join(m.dir, lot+".jws") }

func (m memory) Keep(lot string, jws []byte) error {
	if err := durable.MkdirAll(m.dir, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(m.file(lot), jws, 0o600)
}

func (m memory) Kept(lot string) ([]byte, error) { return os.ReadFile(m.file(lot)) }

func (m memory) Last(ctx context.Context, lot string) (mark directory.ListMark, found bool, err error) {
	subject := binding.RevocationsSubject(m.manufacturer, lot)
	detail, found, err := m.LastNote(ctx, binding.EventRevocations, subject)
	if err == nil && found {
		if err = strict.Parse([]byte(detail), &mark); err != nil {
			err = fmt.Errorf("the ledger's last entry about %s: %w", subject, err)
		}
	}
	return mark, found, err
}

func (m memory) Note(ctx context.Context, lot string, mark directory.ListMark) error {
	detail, err := json.Marshal(mark)
	if err != nil {
		return err
	}
	own := binding.WithActor(ctx, binding.Actor{})
	return m.Ledger.Note(own, binding.EventRevocations, binding.RevocationsSubject(m.manufacturer, lot), string(detail))
}

// ReadOnly is Memory for a process that changes neither: it forgets at its end what it has noted.
func ReadOnly(ledger Ledger, manufacturer, dir string) directory.Memory {
	return &readOnly{Memory: Memory(ledger, manufacturer, dir)}
}

type readOnly struct {
	directory.Memory
	noted sync.Map // of lots: directory.ListMark
}

func (m *readOnly) Last(ctx context.Context, lot string) (mark directory.ListMark, found bool, err error) {
	if own, ok := m.noted.Load(lot); ok {
		return own.(directory.ListMark), true, nil
	}
	return m.Memory.Last(ctx, lot)
}

func (m *readOnly) Note(_ context.Context, lot string, mark directory.ListMark) error {
	m.noted.Store(lot, mark)
	return nil
}

func (*readOnly) Keep(string, []byte) error { return nil }
