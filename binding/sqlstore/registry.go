package sqlstore

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/binding/registry"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/ledger"
	"github.com/kmehsm/kmehsm/binding/sqlstore/internal/tables"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/sqlconn"
	"github.com/kmehsm/kmehsm/kme"
)

func verdictOf(r tables.Row, from int) registry.Verdict {
	return registry.Verdict{Withdrawn: r.Int(from) == 1, By: r.Text(from + 1), Reason: r.Text(from + 2),
		Time: tables.Time(r.Int(from + 3))}
}

func verdictValues(v registry.Verdict) []any {
	return []any{tables.Int(v.Withdrawn), v.By, v.Reason, tables.Millis(v.Time)}
}

func manufacturerValues(m *registry.Manufacturer, seq int64) []any {
	tacs := make([]string, len(m.TACs))
	for i, t := range m.TACs {
		tacs[i] = t.String()
	}
	return slices.Concat([]any{m.KeyID, m.PEM, m.Operator, m.Directory, strings.Join(tacs, " "),
		tables.Millis(m.Enrolled)}, verdictValues(m.Verdict), []any{seq})
}

func lotValues(l *registry.Lot, seq int64) []any {
	return slices.Concat([]any{l.Manufacturer, l.Manifest.Lot, l.ManifestJWS, tables.Millis(l.Imported)},
		verdictValues(l.Retired), []any{seq})
}

// registry is settled, and refuses while the ledger is rolled back.
func (s *Store) registry(ctx context.Context, f func(sqlconn.Conn) error) error {
	if err := s.chains.Refusal(); err != nil {
		return err
	}
	return s.settled(ctx, "read the registry", "registry", f)
}

func (s *Store) PutManufacturer(ctx context.Context, m *registry.Manufacturer) error {
	return s.change(ctx, "enroll", "registry", func(ctx context.Context, tx *txn) error {
		all, err := s.manufacturers(ctx, tx.Conn)
		if err != nil {
			return err
		}
		now := *m
		if i := slices.IndexFunc(all, func(o *registry.Manufacturer) bool { return o.KeyID == m.KeyID }); i >= 0 {
			now.Verdict = all[i].Verdict
		}
		seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: binding.EventEnrolled,
			Subject: binding.ManufacturerSubject(m.KeyID),
			Detail:  enrolled(m)})
		if err != nil {
			return err
		}
		return s.macs.Put(ctx, tx.Conn, tables.Manufacturers, manufacturerValues(&now, seq)...)
	})
}

// enrolled is what an entry says of an enrolment.
func enrolled(m *registry.Manufacturer) string {
	detail := "as operator " + m.Operator
	if m.Directory != "" {
		detail += ", directory " + m.Directory
	}
	if len(m.TACs) > 0 {
		detail += fmt.Sprint(", TACs ", m.TACs)
	}
	return detail
}

func (s *Store) Manufacturers(ctx context.Context) (all []*registry.Manufacturer, err error) {
	err = s.registry(ctx, func(q sqlconn.Conn) error {
		all, err = s.manufacturers(ctx, q)
		return err
	})
	return all, err
}

// manufacturers gives all. It verifies that each is the one that its key names.
func (s *Store) manufacturers(ctx context.Context, q sqlconn.Conn) (all []*registry.Manufacturer, err error) {
	found := map[string]int64{}
	err = s.macs.Each(ctx, q, tables.Manufacturers, func(r tables.Row) error {
		m := &registry.Manufacturer{
			KeyID: r.Text(0), PEM: r.Text(1), Operator: r.Text(2), Directory: r.Text(3),
			Enrolled: tables.Time(r.Int(5)), Verdict: verdictOf(r, 6),
		}
		for text := range strings.FieldsSeq(r.Text(4)) {
			t, err := kme.ParseTAC(text)
			if err != nil {
				return err
			}
			m.TACs = append(m.TACs, t)
		}
		verifier, err := directory.ParseVerifier([]byte(m.PEM))
		if err != nil {
			return fmt.Errorf("manufacturer %s: %w", m.KeyID, err)
		}
		if verifier.KeyID() != m.KeyID {
			return tables.Damaged(tables.Manufacturers, r, "has the key of "+verifier.KeyID())
		}
		all = append(all, m)
		found[m.KeyID] = r.Int(10)
		return nil
	}, `ORDER BY key_id`)
	if err == nil {
		err = s.same(ctx, q, tables.Manufacturers, found, binding.ManufacturerSubject(""))
	}
	return all, err
}

// same fails unless there is a row for each subject of the ledger, and each is the last one.
func (s *Store) same(
	ctx context.Context, q sqlconn.Conn, t *tables.Table, found map[string]int64, subject string,
) error {
	last, err := s.chains.LastOf(ctx, q, subject)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(last)) {
		if _, there := found[name]; !there {
			return &binding.DamagedRow{Table: t.Name, Key: name, What: "is gone"}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if found[name] != last[name] {
			return &binding.DamagedRow{Table: t.Name, Key: name,
				What: "is an earlier one than the service has written last"}
		}
	}
	return nil
}

func (s *Store) Decide(ctx context.Context, manufacturer, lot string, v registry.Verdict,
	check func([]*registry.Lot) error) (stands registry.Verdict, err error) {
	err = s.change(ctx, "decide", "registry", func(ctx context.Context, tx *txn) error {
		makers, err := s.manufacturers(ctx, tx.Conn)
		if err != nil {
			return err
		}
		all, err := s.lots(ctx, tx.Conn, makers)
		if err != nil {
			return err
		}
		enter := func(was *registry.Verdict, withdraw, restore binding.Event, subject string,
			write func(seq int64) error) error {
			if stands = *was; was.Withdrawn == v.Withdrawn { // maybe by a change with an unknown result
				return s.confirm(ctx, tx)
			}
			if err := check(all); err != nil {
				return err
			}
			event := restore
			if v.Withdrawn {
				event = withdraw
			}
			seq, err := s.chains.Enter(ctx, &tx.Tx, ledger.Entry{Event: event, Subject: subject, Detail: v.Reason})
			if err != nil {
				return err
			}
			*was, stands = v, v
			return write(seq)
		}
		for _, m := range makers {
			if lot == "" && m.KeyID == manufacturer {
				return enter(&m.Verdict, binding.EventDistrusted, binding.EventTrusted,
					binding.ManufacturerSubject(m.KeyID), func(seq int64) error {
						return s.macs.Put(ctx, tx.Conn, tables.Manufacturers, manufacturerValues(m, seq)...)
					})
			}
		}
		for _, l := range all {
			if lot != "" && l.Manufacturer == manufacturer && l.Manifest.Lot == lot {
				return enter(&l.Retired, binding.EventRetired, binding.EventReinstated,
					binding.LotSubject(manufacturer, lot), func(seq int64) error {
						return s.macs.Put(ctx, tx.Conn, tables.Lots, lotValues(l, seq)...)
					})
			}
		}
		return registry.ErrNotImported
	})
	return stands, err
}

func (s *Store) PutLot(ctx context.Context, lot *registry.Lot, check func([]*registry.Lot) error) error {
	return s.change(ctx, "import a lot", "registry", func(ctx context.Context, tx *txn) error {
		all, err := s.imported(ctx, tx.Conn)
		if err == nil {
			err = check(all)
		}
		if err != nil {
			return err
		}
		if slices.ContainsFunc(all, func(o *registry.Lot) bool {
			return o.Manufacturer == lot.Manufacturer && o.Manifest.Lot == lot.Manifest.Lot
		}) {
			return nil
		}
		seq, err := s.chains.Enter(ctx, &tx.Tx,
			ledger.Entry{Event: binding.EventImported, Subject: binding.LotSubject(lot.Manufacturer, lot.Manifest.Lot)})
		if err != nil {
			return err
		}
		return s.macs.Add(ctx, tx.Conn, tables.Lots, lotValues(lot, seq)...)
	})
}

func (s *Store) Lots(ctx context.Context) (all []*registry.Lot, err error) {
	err = s.registry(ctx, func(q sqlconn.Conn) error {
		all, err = s.imported(ctx, q)
		return err
	})
	return all, err
}

// imported gives all lots.
func (s *Store) imported(ctx context.Context, q sqlconn.Conn) ([]*registry.Lot, error) {
	makers, err := s.manufacturers(ctx, q)
	if err != nil {
		return nil, err
	}
	return s.lots(ctx, q, makers)
}

// lots gives all, with their verified manifests.
func (s *Store) lots(
	ctx context.Context, q sqlconn.Conn, makers []*registry.Manufacturer,
) (all []*registry.Lot, err error) {
	found, verifiers := map[string]int64{}, map[string]*directory.Verifier{}
	for _, m := range makers {
		if verifiers[m.KeyID], err = directory.ParseVerifier([]byte(m.PEM)); err != nil {
			return nil, err
		}
	}
	err = s.macs.Each(ctx, q, tables.Lots, func(r tables.Row) error {
		l := &registry.Lot{Manufacturer: r.Text(0), ManifestJWS: r.Text(2), Imported: tables.Time(r.Int(3)),
			Retired: verdictOf(r, 4)}
		at := slices.IndexFunc(makers, func(m *registry.Manufacturer) bool { return m.KeyID == l.Manufacturer })
		if at < 0 {
			return tables.Damaged(tables.Lots, r, "is of a manufacturer who is not enrolled")
		}
		if l.Manifest, err = s.manifest(verifiers[l.Manufacturer], r.Text(1), l.ManifestJWS); err != nil {
			return err
		}
		l.Distrusted = makers[at].Verdict
		all = append(all, l)
		found[l.Manufacturer+" "+l.Manifest.Lot] = r.Int(8)
		return nil
	}, `ORDER BY manufacturer, lot`)
	if err == nil {
		err = s.same(ctx, q, tables.Lots, found, "lot ")
	}
	return all, err
}

// manifest gives a verified manifest. It verifies each once: /readyz reads all lots, too.
func (s *Store) manifest(v *directory.Verifier, lot, jws string) (*directory.Manifest, error) {
	key := sha256.Sum256([]byte(v.KeyID() + "\n" + lot + "\n" + jws))
	if known, ok := s.manifests.Load(key); ok {
		return known.(*directory.Manifest), nil
	}
	m, err := v.Manifest(lot, []byte(jws))
	if err == nil {
		s.manifests.Store(key, m)
	}
	return m, err
}
