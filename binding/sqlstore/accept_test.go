package sqlstore

import (
	"context"
	"errors"
	"path/filepath"
	"testing"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/mark"
	"github.com/kmehsm/kmehsm/internal/sqlite"
)

// A crashing token is that of a process which is killed before its mark is set.
type crashing struct{ *markToken }

var errKilled = errors.New("killed")

func (crashing) SetMark(context.Context, []byte, [][]byte) error { return errKilled }

// An accept-rollback that is killed between the database's commit and the token's mark is made again, or was done: with
// the whole audit log nothing is missing any more, and else the same is accepted once more. What is revoked by it stays
// so, no entry comes back twice, and what the first one did can be told by the ledger.
func TestAcceptKilled(t *testing.T) {
	for _, known := range []bool{true, false} {
		ctx, p, copied := t.Context(), path(t), filepath.Join(t.TempDir(), "copy.db")
		h := &history{t: t, s: must(Open(ctx, "sqlite:"+p, rowKey)), token: new(markToken),
			audit: filepath.Join(t.TempDir(), "audit")}
		h.lose(func() {
			done(t, sqlite.Backup(ctx, p, copied, func(int, int) {}, func(string) error { return nil }))
		})
		options := mark.AcceptOptions{Reason: "the disk", Agreed: func(*binding.Missing) error { return nil }}
		if known {
			options.AuditLogs = []string{h.audit}
		}
		s := must(Open(ctx, "sqlite:"+copied, rowKey))
		if _, _, err := mark.Accept(ctx, s, crashing{h.token}, options); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		done(t, s.Close())
		s = must(Open(ctx, "sqlite:"+copied, rowKey))
		defer s.Close()
		err := mark.Check(ctx, s, h.token)
		if errors.Is(err, binding.ErrRolledBack) == known {
			t.Errorf("with the whole audit log: %v: after the first, %v", known, err)
		}
		_, accepted, err := mark.Accept(ctx, s, h.token, options)
		if (err == nil) == known {
			t.Errorf("with the whole audit log: %v: the second gives %v", known, err)
		}
		if err == nil && len(accepted.Changes) > 0 {
			t.Errorf("changed a second time: %+v", accepted.Changes)
		}
		done(t, mark.Raise(ctx, s, h.token))
		done(t, mark.Check(ctx, s, h.token))
		if d := must(s.Verify(ctx, func(int, int) {})).Damaged; len(d) > 0 {
			t.Errorf("damaged: %v", d)
		}
		for n, bound := range map[int]bool{stays: true, revoked: !known, rebound: true} {
			sub := must(s.Subscription(ctx, imsiNo(t, n), t0))
			if n == rebound && known {
				bound = false
			}
			if (sub.Standing() != nil) != bound {
				t.Errorf("with the whole audit log: %v: subscription %d is %+v", known, n, sub.Standing())
			}
		}
		h.s = s
		h.bind(lastBound+others, lastBound+others)
	}
}
