package custody

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/hsmkeys/officer"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A Token is the token whose security officer's PIN it is.
type Token interface {
	fmt.Stringer
	Serial() string
	OfficerSplit(ctx context.Context) (inForce, begun *hsmkeys.Split, err error)
}

// An Officer is how the security officer's PIN comes to a command: from a file, or from shares, in files or pasted at a
// terminal.
type Officer struct {
	Source string              // a pin-source; empty for shares
	Shares []string            // files, each as a custodian has decrypted it
	Ask    func(*Quorum) error // takes shares at a terminal; nil if there is none
}

// ErrNoOfficerPIN: neither a file nor shares were named for the PIN.
var ErrNoOfficerPIN = errors.New("this needs the security officer's PIN")

// A Basis is what a command needs to know of the security officer's PIN before it logs in.
type Basis int

const (
	// Settled: the token says whether the PIN is in shares, and in which.
	Settled Basis = iota
	// MaybeInterrupted: the token says it, but an interrupted change may have set another PIN.
	MaybeInterrupted
	// Anything: the PIN that was given is tried, whatever the token says. Shares must still be of one split of this
	// token.
	Anything
)

// PIN is the security officer's PIN, and the numbers of the custodians whose shares gave it. A PIN that cannot be the
// token's, by what the token says, is refused, so that it costs none of the few tries that a token allows.
func (o Officer) PIN(
	ctx context.Context, token Token, basis Basis,
) (pin hsmkeys.OfficerPIN, custodians []int, err error) {
	inForce, begun, err := token.OfficerSplit(ctx)
	if err != nil {
		return pin, nil, err
	}
	if begun != nil && basis == Settled {
		return pin, nil, fmt.Errorf("factory so split was interrupted, and the security officer's PIN may be the one "+
			"before, or be in shares of split %s: run factory so check with either", begun.ID)
	}
	if o.Source != "" {
		if inForce != nil && begun == nil && basis != Anything {
			return pin, nil, usage.In("so-share", fmt.Errorf("the security officer's PIN of %s is in shares, %s: give "+
				"these; no PIN of a file was tried", token, describe(inForce)))
		}
		if pin.PIN, err = hsmkeys.ReadPIN(o.Source); err != nil {
			return pin, nil, fmt.Errorf("the security officer's PIN: %w", err)
		}
		return pin, nil, nil
	}
	q := &Quorum{Token: token.Serial()}
	for _, s := range []*hsmkeys.Split{inForce, begun} {
		if s != nil {
			q.Splits = append(q.Splits, *s)
		}
	}
	switch {
	case len(o.Shares) > 0 && len(q.Splits) == 0 && basis != Anything:
		err = usage.In("so-pin-source", fmt.Errorf("the security officer's PIN of %s is in no shares: name its file; "+
			"if somebody has removed what the token says of them, factory so check with the shares brings it back",
			token))
	case len(o.Shares) > 0:
		err = q.ReadFiles(o.Shares)
	case len(q.Splits) == 0:
		err = usage.In("so-pin-source", fmt.Errorf("%w of %s, which is in no shares: name its file", ErrNoOfficerPIN,
			token))
	case o.Ask == nil:
		err = usage.In("so-share", fmt.Errorf("%w of %s, which is in shares, %s: give each, or run this at a terminal",
			ErrNoOfficerPIN, token, describe(inForce)))
	default:
		err = o.Ask(q)
	}
	if err != nil {
		return pin, nil, err
	}
	pin.PIN, err = q.PIN()
	pin.Split = q.Split()
	return pin, q.Indexes(), err
}

func describe(s *hsmkeys.Split) string {
	if s == nil {
		return "of a split that was interrupted"
	}
	return fmt.Sprintf("%d of %d of split %s", s.Threshold, s.Count, s.ID)
}

// SplitOfficerPIN gives the token a new security officer's PIN, which nobody has seen, in as many shares as there are
// custodians. The shares are on disk, each encrypted to its custodian, below dir, before the PIN is set. With
// hsmkeys.ErrPINMaybeSet they are kept, since the PIN may be in them; with another error nothing is left of them.
func SplitOfficerPIN(
	ctx context.Context, tokenURI, serial string, present hsmkeys.OfficerPIN, threshold int,
	custodians []Custodian, dir string,
) (split *hsmkeys.Split, files []string, err error) {
	pin, shares, err := New(serial, threshold, len(custodians))
	if err != nil {
		return nil, nil, err
	}
	split = &shares[0].Split.Split
	dir = filepath.Join(dir, "so-"+split.ID)
	if err := cmp.Or(durable.Mkdir(filepath.Dir(dir), 0o700), durable.Mkdir(dir, 0o700)); err != nil {
		return nil, nil, err
	}
	for i, s := range shares {
		data, eerr := s.Encrypt(custodians[i])
		path := filepath.Join(dir, fmt.Sprintf("custodian-%d.age", s.Index))
		files = append(files, path)
		if err = errors.Join(err, eerr); err == nil {
			err = durable.WriteFile(path, data, 0o600)
		}
	}
	if err != nil {
		err = fmt.Errorf("the shares cannot be written, and the PIN was not changed: %w", err)
	} else {
		err = officer.SetPIN(ctx, tokenURI, present, hsmkeys.OfficerPIN{PIN: pin, Split: split})
	}
	if errors.Is(err, hsmkeys.ErrPINMaybeSet) {
		return nil, nil, fmt.Errorf("%w; factory so check finds out, with the PIN before or with the shares of split "+
			"%s in %s: keep both", err, split.ID, dir)
	} else if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return split, files, nil
}
