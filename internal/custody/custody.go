// Package custody splits a security officer's PIN among custodians, so that some of them must come together to have it.
//
// The PIN is derived from a random scalar of the group ristretto255, which Shamir's scheme splits. Feldman's
// commitments, which every share has, show of each share by itself that it is one of its split, before any PIN is
// tried.
package custody

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"filippo.io/age"
	"github.com/cloudflare/circl/group"
	"github.com/cloudflare/circl/secretsharing"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/strict"
)

// MaxShares bounds a split. A share is one line, and a terminal's line ends at 4095 bytes.
const MaxShares = 16

const shareType = "kme-so-share"

var curve = group.Ristretto255

// size is that of a scalar and of an element, in bytes.
const size = 32

// A Split is what all shares of a split have in common. It is public.
type Split struct {
	hsmkeys.Split
	Token       string        // serial number of the token whose PIN it is
	Commitments strict.Base64 // Threshold elements: to the coefficients of the polynomial, whose first is the secret
}

// id is the split's name, which depends on all that is in it.
func (s *Split) id() string {
	h := sha256.Sum256(fmt.Appendf(nil, "kmehsm split 1\x00%s\x00%d\x00%d\x00%x", s.Token, s.Threshold, s.Count,
		[]byte(s.Commitments)))
	return hex.EncodeToString(h[:10])
}

func (s *Split) commitments() (secretsharing.SecretCommitment, error) {
	var c secretsharing.SecretCommitment
	for b := s.Commitments; len(b) > 0; b = b[size:] {
		e := curve.NewElement()
		if err := e.UnmarshalBinary(b[:size]); err != nil {
			return nil, err
		}
		c = append(c, e)
	}
	return c, nil
}

// A Share is one custodian's. It prints without its secret.
type Share struct {
	Split
	Index int // from 1 on: the custodian's number
	value secretsharing.Share
}

// Format prints which share it is, whatever the verb.
func (s Share) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "share %d of split %s", s.Index, s.ID)
}

// wire is a share as its custodian decrypts it: one line of JSON.
type wire struct {
	Type        string        `json:"typ"`
	Token       string        `json:"token"`
	Split       string        `json:"split"`
	Index       int           `json:"index"`
	Threshold   int           `json:"threshold"`
	Count       int           `json:"count"`
	Commitments strict.Base64 `json:"commitments"`
	Value       strict.Base64 `json:"value"`
}

// New makes a new PIN for a token, and count shares, of which threshold have it. All are checked as those are that
// custodians bring.
func New(token string, threshold, count int) (hsmkeys.PIN, []*Share, error) {
	if err := CheckSize(threshold, count); err != nil {
		return "", nil, err
	}
	sharing := secretsharing.New(rand.Reader, uint(threshold-1), curve.RandomNonZeroScalar(rand.Reader))
	split := Split{Token: token}
	split.Threshold, split.Count = threshold, count
	for _, c := range sharing.CommitSecret() {
		b, err := c.MarshalBinaryCompress()
		if err != nil {
			return "", nil, err
		}
		split.Commitments = append(split.Commitments, b...)
	}
	split.ID = split.id()
	var shares []*Share
	for i, value := range sharing.Share(uint(count)) {
		text, err := (&Share{Split: split, Index: i + 1, value: value}).Marshal()
		if err != nil {
			return "", nil, err
		}
		s, err := Parse(text)
		if err != nil {
			return "", nil, err
		}
		shares = append(shares, s)
	}
	var pin hsmkeys.PIN
	for i := range shares { // every share is in threshold of these
		q := Quorum{Token: token, Splits: []hsmkeys.Split{split.Split}}
		for j := range threshold {
			if err := q.Add(shares[(i+j)%count]); err != nil {
				return "", nil, err
			}
		}
		p, err := q.PIN()
		if err != nil || pin != "" && p != pin {
			return "", nil, errors.Join(errors.New("the shares do not give one PIN"), err)
		}
		pin = p
	}
	return pin, shares, nil
}

// CheckSize refuses sizes that no split may have.
func CheckSize(threshold, count int) error {
	if threshold < 2 || threshold > count || count > MaxShares {
		return fmt.Errorf("%d of %d shares: at least 2 are needed, and there are at most %d", threshold,
			count, MaxShares)
	}
	return nil
}

// Marshal is the share with its secret, one line.
func (s *Share) Marshal() ([]byte, error) {
	value, err := s.value.Value.MarshalBinary()
	if err != nil {
		return nil, err
	}
	line, err := json.Marshal(wire{
		Type: shareType, Token: s.Token, Split: s.ID, Index: s.Index, Threshold: s.Threshold, Count: s.Count,
		Commitments: s.Commitments, Value: value,
	})
	return append(line, '\n'), err
}

// Parse reads a share, and verifies that it belongs to the split that it names. Its errors have nothing of the share's
// secret.
func Parse(text []byte) (*Share, error) {
	text = bytes.TrimSpace(text)
	if bytes.HasPrefix(text, []byte("age-encryption.org/")) ||
		bytes.HasPrefix(text, []byte("-----BEGIN AGE ENCRYPTED FILE")) {
		return nil, errors.New("the share is still encrypted: its custodian decrypts it with age -d -i KEYFILE FILE")
	}
	var w wire
	if err := strict.Parse(text, &w); err != nil || w.Type != shareType {
		return nil, errors.New("it is no share: a share is the one line that age -d prints of a custodian's file")
	}
	if err := CheckSize(w.Threshold, w.Count); err != nil {
		return nil, fmt.Errorf("the share is damaged: %w", err)
	}
	s := &Share{Index: w.Index, Split: Split{
		Split: hsmkeys.Split{ID: w.Split, Threshold: w.Threshold, Count: w.Count}, Token: w.Token,
		Commitments: w.Commitments,
	}}
	damaged := fmt.Errorf("the share is damaged: it is not share %d of split %q", w.Index, w.Split)
	if w.Index < 1 || w.Index > w.Count || len(w.Commitments) != size*w.Threshold || len(w.Value) != size ||
		w.Split != s.id() {
		return nil, damaged
	}
	commitments, err := s.commitments()
	if err != nil {
		return nil, damaged
	}
	s.value = secretsharing.Share{ID: curve.NewScalar().SetUint64(uint64(w.Index)), Value: curve.NewScalar()}
	if s.value.Value.UnmarshalBinary(w.Value) != nil ||
		!secretsharing.Verify(uint(w.Threshold-1), s.value, commitments) {
		return nil, damaged
	}
	return s, nil
}

// A Quorum collects shares of one split.
type Quorum struct {
	Token  string          // serial number
	Splits []hsmkeys.Split // those that may be; any if there are none
	shares []*Share
}

// Add adds a share, or says why not.
func (q *Quorum) Add(s *Share) error {
	if s.Token != q.Token {
		return fmt.Errorf("%v is of the token with serial number %q, not of %q", s, s.Token, q.Token)
	}
	if len(q.Splits) > 0 && !slices.Contains(q.Splits, s.Split.Split) {
		return fmt.Errorf("%v is of another split than the one that the token names, %s", s,
			q.Splits[len(q.Splits)-1].ID)
	}
	for _, have := range q.shares {
		if have.ID != s.ID {
			return fmt.Errorf("%v is not of the same split as %v", s, have)
		}
		if have.Index == s.Index {
			return fmt.Errorf("%v was given twice", s)
		}
	}
	q.shares = append(q.shares, s)
	return nil
}

// Split is that of the shares so far; nil if there are none.
func (q *Quorum) Split() *hsmkeys.Split {
	if len(q.shares) == 0 {
		return nil
	}
	return &q.shares[0].Split.Split
}

// Indexes are the shares' own, in the order in which they were added.
func (q *Quorum) Indexes() (all []int) {
	for _, s := range q.shares {
		all = append(all, s.Index)
	}
	return all
}

// PIN is what the shares give. Since each was checked, it is the one that the split was made of.
func (q *Quorum) PIN() (hsmkeys.PIN, error) {
	split := q.Split()
	if split == nil {
		return "", errors.New("there are no shares")
	}
	if have := len(q.shares); have < split.Threshold {
		return "", fmt.Errorf("%d shares of split %s are not enough: it takes %d", have, split.ID, split.Threshold)
	}
	var values []secretsharing.Share
	for _, s := range q.shares {
		values = append(values, s.value)
	}
	secret, err := secretsharing.Recover(uint(split.Threshold-1), values)
	if err != nil {
		return "", err
	}
	commitments, err := q.shares[0].commitments()
	if err != nil || !curve.NewElement().MulGen(secret).IsEqual(commitments[0]) {
		return "", fmt.Errorf("the shares do not give the PIN of split %s", split.ID)
	}
	b, err := secret.MarshalBinary()
	if err != nil {
		return "", err
	}
	defer clear(b)
	h := sha256.Sum256(append([]byte("kmehsm security officer's PIN 1\x00"), b...))
	return hsmkeys.PIN(base32.StdEncoding.EncodeToString(h[:20])), nil // 32 letters and digits
}

// A Custodian is whom a share is encrypted to.
type Custodian struct {
	age.Recipient
	name string
}

// String is the recipient as it was given.
func (c Custodian) String() string { return c.name }

// ParseCustodians reads age recipients, of which no two may be the same.
func ParseCustodians(recipients []string) (all []Custodian, err error) {
	for i, text := range recipients {
		if strings.HasPrefix(strings.ToUpper(text), "AGE-SECRET-KEY-") {
			return nil, fmt.Errorf("custodian %d: this is a secret key, and everybody on this machine can have seen "+
				"it now: make another with age-keygen, and give what it calls the public key", i+1)
		}
		r, err := age.ParseRecipients(strings.NewReader(text))
		if err != nil || len(r) != 1 {
			return nil, fmt.Errorf("custodian %d: %q is no age recipient: it begins with age1, and age-keygen calls "+
				"it the public key", i+1, text)
		}
		c := Custodian{Recipient: r[0], name: fmt.Sprint(r[0])}
		for j, other := range all {
			if other.name == c.name {
				return nil, fmt.Errorf("custodians %d and %d are the same: each share needs a custodian of its own",
					j+1, i+1)
			}
		}
		all = append(all, c)
	}
	return all, nil
}

// Encrypt is the share for its custodian, as age decrypts it.
func (s *Share) Encrypt(c Custodian) ([]byte, error) {
	line, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	defer clear(line)
	var file bytes.Buffer
	w, err := age.Encrypt(&file, c)
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(w, bytes.NewReader(line)); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return file.Bytes(), nil
}
