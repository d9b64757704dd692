package keysvcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/operatorpage"
)

// health says how the service is, for the operator page. The log has the causes, as with /readyz.
func (d *daemon) health(
	ctx context.Context, s *state, service *binding.Service, bound *census,
) (h operatorpage.Health) {
	h.Store.Kind, _, _ = strings.Cut(d.started.Store, ":")
	h.Store.Entries = d.store.Seen().Entries()
	if n := bound.last.Load(); n != nil {
		h.Store.Bindings, h.Store.Counted = n.bindings, n.at
	}
	for _, token := range d.tokens.Tokens() {
		now := token.Health()
		h.Tokens = append(h.Tokens, operatorpage.Token{Name: token.String(), Works: now.Cause == nil,
			Sessions: token.Sessions(), Hung: now.Hung, Reopened: now.Reinitialised})
	}
	for _, c := range s.certificates {
		h.Certificates = append(h.Certificates, operatorpage.Certificate{For: c.of, Subject: c.Subject.String(),
			Ends: c.NotAfter})
	}
	warnings, err := d.ready(ctx, service)
	if h.Warnings = warnings; err != nil {
		h.Problem = "the HSM or the database does not work; the log has the cause"
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	lots, err := d.store.Lots(short)
	if h.Store.Works = err == nil; errors.Is(err, binding.ErrRolledBack) {
		h.Problem = "the database is an earlier one than the service has written, and no call is served: see " +
			"KeysvcDatabaseTamperedWith in docs/runbook.md"
	}
	manufacturers, _ := d.store.Manufacturers(short) // on an error there are none, as without lots
	away := service.CheckDirectories(short)
	for _, m := range manufacturers {
		h.Directories = append(h.Directories, operatorpage.Directory{Manufacturer: m.KeyID,
			Works: away[m.KeyID] == nil, Distrusted: m.Verdict.Withdrawn})
	}
	lists := map[[2]string]directory.ListState{}
	for manufacturer, all := range s.lots.Lists() {
		for _, l := range all {
			lists[[2]string{manufacturer, l.Lot}] = l
		}
	}
	for _, lot := range lots {
		list := lists[[2]string{lot.Manufacturer, lot.Manifest.Lot}]
		shown := operatorpage.Lot{
			Manufacturer: lot.Manufacturer, Lot: lot.Manifest.Lot, Devices: lot.Manifest.Devices(),
			Served: lot.Served(), List: list.Version, Read: list.Read, Overdue: string(list.Why),
		}
		switch {
		case lot.Distrusted.Withdrawn:
			shown.Why = "its manufacturer is distrusted"
		case lot.Retired.Withdrawn:
			shown.Why = "retired"
		}
		var ranges []string
		for _, r := range lot.Manifest.Ranges {
			ranges = append(ranges, fmt.Sprintf("%s, %06d to %06d", r.TAC, r.First, r.First+r.Count-1))
		}
		shown.IMEIs = strings.Join(ranges, "; ")
		h.Lots = append(h.Lots, shown)
	}
	return h
}
