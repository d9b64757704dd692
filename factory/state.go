package factory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/factory/auditlog"
	"github.com/kmehsm/kmehsm/factory/shard"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/pemkey"
)

// A State is the line's own folder. It has the journal of the shards, the audit log of all commands, the minutes of
// ceremonies, the record of grants, and the lock of the commands that make keys.
type State struct{ Dir string }

func (s State) path(names ...string) string { return filepath.Join(s.Dir, filepath.Join(names...)) }

// PublicKey is the default file of the manufacturer's public key.
func (s State) PublicKey() string { return s.path("manufacturer.pem") }

// Injection is the default folder of the injection packages.
func (s State) Injection() string { return s.path("injection") }

// linkPackages makes a link to the folder of a lot's injection packages where they are by default, so that other
// commands find them there. What is there already stays, but for a link that leads nowhere.
func (s State) linkPackages(lot, dir string) error {
	link := filepath.Join(s.Injection(), lot)
	if _, err := os.Stat(link); err == nil {
		return nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if err := durable.MkdirAll(s.Injection(), 0o700); err != nil {
		return err
	}
	if err := renameio.Symlink(dir, link); err != nil {
		return err
	}
	return durable.SyncDir(s.Injection())
}

// Check fails unless factory init has made the folder for this token.
func (s State) Check(token Token) error {
	if _, err := os.Stat(s.path(auditlog.File)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the folder %s is no line's: run factory init first; or, if it is elsewhere, name it with "+
			"state", s.Dir)
	} else if err != nil {
		return err
	}
	return Fits(token, s.PublicKey())
}

// Fits fails if a file has the public key of another manufacturer than the token's. The file need not exist.
func Fits(token Token, path string) error {
	have, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	own := "which has no signing key yet"
	signer, err := openSigner(token)
	switch {
	case err == nil:
		pem, err := pemkey.Encode(signer.Public())
		if err != nil || bytes.Equal(have, pem) {
			return err
		}
		own = "that of manufacturer " + signer.KeyID()
	case !errors.Is(err, errNoSigningKey):
		return err
	}
	return fmt.Errorf("%s is not of this token, %s: name another token, or with state the folder of this one",
		path, own)
}

// Log is the audit log of all commands that use the token.
func (s State) Log() auditlog.Log { return auditlog.Log{Dir: s.Dir} }

// SignLog signs a line of the audit log by the token. Before factory init, when it has no signing key, it does nothing.
func (s State) SignLog(token Token, head *auditlog.Head) error {
	signer, err := openSigner(token)
	if errors.Is(err, errNoSigningKey) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.Log().Sign(signer, head)
}

func (s State) journal(ctx context.Context, manufacturer string) (*shard.Journal, error) {
	return shard.OpenJournal(ctx, s.path("journal.db"), manufacturer)
}

// Entries gives what the line's journal has of a lot's shards: nothing, if there is no journal yet.
func (s State) Entries(ctx context.Context, manufacturer, lot string) (map[int]shard.Entry, error) {
	if _, err := os.Stat(s.path("journal.db")); err != nil {
		return nil, nil
	}
	j, err := s.journal(ctx, manufacturer)
	if err != nil {
		return nil, err
	}
	entries, err := j.Entries(ctx, lot)
	return entries, errors.Join(err, j.Close())
}

// recordGrant notes, durably, that an operator was granted a lot: grants/OPERATOR/LOT has the time of the first grant.
// The grant itself is not kept. forget removes the note if it is new.
func (s State) recordGrant(operator, lot string) (forget func() error, err error) {
	dir := s.path("grants", operator)
	path := filepath.Join(dir, lot)
	if _, err := os.Stat(path); err == nil {
		return func() error { return nil }, nil
	}
	if err := durable.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	forget = func() error {
		err := os.Remove(path)
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		os.Remove(dir) // only where it is empty, after an operator's first grant
		os.Remove(filepath.Dir(dir))
		return err
	}
	if err := durable.WriteFile(path, []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o644); err != nil {
		return nil, errors.Join(err, forget())
	}
	return forget, nil
}

// GrantedLots lists the lots that an operator was granted, sorted, for a Vault policy. The names of policies are
// case-insensitive: it refuses operators whose names differ in case alone.
func (s State) GrantedLots(operator string) (lots []string, err error) {
	if err := directory.CheckName(operator); err != nil {
		return nil, err
	}
	names := func(folder string) (names []string, err error) {
		entries, err := os.ReadDir(s.path("grants", folder))
		for _, e := range entries {
			if directory.CheckName(e.Name()) == nil {
				names = append(names, e.Name())
			}
		}
		return names, err
	}
	operators, err := names("")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if !slices.Contains(operators, operator) {
		return nil, fmt.Errorf("operator %s was granted nothing, as far as the folder %s knows", operator, s.Dir)
	}
	for _, other := range operators {
		if other != operator && strings.EqualFold(other, operator) {
			return nil, fmt.Errorf("to Vault the operators %s and %s are one, and would have one policy: enroll one "+
				"of them by another name, and grant it its lots by that", min(operator, other), max(operator, other))
		}
	}
	return names(operator)
}

// A Granted says to whom a lot was granted, and when first.
type Granted struct {
	Operator string    `json:"operator"`
	Time     time.Time `json:"time"`
}

// Grants lists to whom a lot was granted.
func (s State) Grants(lot string) ([]Granted, error) {
	all := []Granted{}
	operators, err := os.ReadDir(s.path("grants"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range operators {
		t, err := readTime(s.path("grants", e.Name(), lot))
		if err != nil {
			return nil, err
		}
		if !t.IsZero() {
			all = append(all, Granted{Operator: e.Name(), Time: t})
		}
	}
	return all, nil
}

// recordSeal notes, durably, when a lot's key was first sealed: sealed/LOT.
func (s State) recordSeal(lot string) error {
	if t, err := s.Sealed(lot); err != nil || !t.IsZero() {
		return err
	}
	if err := durable.Mkdir(s.path("sealed"), 0o755); err != nil {
		return err
	}
	return durable.WriteFile(s.path("sealed", lot), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o644)
}

// Sealed is when a lot's key was sealed; zero if this folder does not know that it was.
func (s State) Sealed(lot string) (time.Time, error) { return readTime(s.path("sealed", lot)) }

// readTime reads a file that has a time; zero if there is none.
func readTime(path string) (time.Time, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	t, err := time.Parse(time.RFC3339, strings.TrimSpace(string(text)))
	if err != nil {
		err = fmt.Errorf("%s is damaged: bring it back from a backup of the folder: %w", path, err)
	}
	return t, err
}
