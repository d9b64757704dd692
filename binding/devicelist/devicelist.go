// Package devicelist reads and enters the operator's own list of devices, as keysvc equipment does.
package devicelist

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/kme"
)

// Parse gives the prefixes of IMEIs that a text stands for. It is an IMEI, a TAC, FIRST-LAST of two TACs, or the first
// digits and a *.
func Parse(text string) ([]string, error) {
	digits := func(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }
	first, last, isRange := strings.Cut(text, "-")
	prefix, isPrefix := strings.CutSuffix(text, "*")
	switch {
	case isRange:
		from, err := kme.ParseTAC(first)
		to, err2 := kme.ParseTAC(last)
		if err != nil || err2 != nil || from.String() > to.String() {
			return nil, fmt.Errorf("%q is no range of TACs: it is two of 8 digits, FIRST-LAST", text)
		}
		return prefixes(from.String(), to.String()), nil
	case isPrefix && digits(prefix) && len(prefix) < kme.IMEIDigits:
		return []string{prefix}, nil
	case isPrefix:
		return nil, fmt.Errorf("%q is no prefix: it is 1 to 13 digits and a *", text)
	}
	if tac, err := kme.ParseTAC(text); err == nil {
		return []string{tac.String()}, nil
	}
	imei, err := kme.ParseIMEI(text)
	if err != nil {
		return nil, fmt.Errorf("%q is no IMEI, no TAC of 8 digits, no FIRST-LAST of TACs and no DIGITS*: %w", text, err)
	}
	return []string{imei.String()}, nil
}

// prefixes gives the fewest prefixes of all numbers from first to last, which have the same length.
func prefixes(first, last string) (all []string) {
	if strings.Trim(first, "0") == "" && strings.Trim(last, "9") == "" {
		return []string{""}
	}
	for d := first[0]; d <= last[0]; d++ {
		from, to := strings.Repeat("0", len(first)-1), strings.Repeat("9", len(first)-1)
		if d == first[0] {
			from = first[1:]
		}
		if d == last[0] {
			to = last[1:]
		}
		for _, rest := range prefixes(from, to) {
			all = append(all, string(d)+rest)
		}
	}
	return all
}

// ParseStatus takes the status of an entry.
func ParseStatus(text string) (binding.EquipmentStatus, error) {
	switch s := binding.EquipmentStatus(strings.ToUpper(text)); s {
	case binding.Whitelisted, binding.Greylisted, binding.Blacklisted:
		return s, nil
	}
	return "", fmt.Errorf("%q is no status: whitelisted, greylisted or blacklisted", text)
}

// New makes the entries of a text of Parse; without a status, those that remove them.
func New(text string, status binding.EquipmentStatus, reason string, now time.Time) (all []binding.Listing, err error) {
	found, err := Parse(text)
	if err != nil {
		return nil, err
	}
	if reason != "" {
		if reason, err = strict.Reason(reason); err != nil {
			return nil, err
		}
	}
	for _, p := range found {
		all = append(all, binding.Listing{Prefix: p, Status: status, Reason: reason,
			Listed: now.UTC().Truncate(time.Millisecond)})
	}
	return all, nil
}

// Read reads entries as CSV (RFC 4180) with the header equipment,status,reason. An error has the number of the first
// wrong line.
func Read(r io.Reader, now time.Time) (all []binding.Listing, err error) {
	const longest = 1 << 12 // of the first line: what is no list may have no line's end for gigabytes
	in := bufio.NewReaderSize(r, longest)
	begin, _ := in.Peek(longest)
	lines := csv.NewReader(in)
	lines.FieldsPerRecord, lines.ReuseRecord = 3, true
	var head []string
	if len(begin) < longest || bytes.IndexByte(begin, '\n') >= 0 {
		head, err = lines.Read()
	}
	if errors.As(err, new(*fs.PathError)) {
		return nil, err
	}
	if err != nil || !slices.Equal(head, []string{"equipment", "status", "reason"}) {
		return nil, errors.New("line 1: the list begins with the line equipment,status,reason")
	}
	for {
		fields, err := lines.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, err // which has the line
		}
		line, _ := lines.FieldPos(0)
		status, err := ParseStatus(fields[1])
		var some []binding.Listing
		if err == nil {
			some, err = New(fields[0], status, fields[2], now)
		}
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", line, err)
		}
		all = append(all, some...)
	}
}

// Enter enters entries, a few in each change, so that a service's changes wait only for these. If it fails, the entries
// so far stay; entering all again continues from there.
func Enter(ctx context.Context, store binding.Listings, all []binding.Listing) (changed int, err error) {
	const together = 200
	for some := range slices.Chunk(all, together) {
		n, err := store.List(ctx, some)
		if err != nil {
			return changed, err
		}
		changed += n
	}
	return changed, nil
}

// Remove is Enter of what removes the entries of a text. It fails if none of them is there.
func Remove(ctx context.Context, store binding.Listings, text string, all []binding.Listing) (changed int, err error) {
	if changed, err = Enter(ctx, store, all); err == nil && changed == 0 {
		err = fmt.Errorf("%s is not listed: see keysvc equipment list", text)
	}
	return changed, err
}

// Standing gives the entries that were not removed, in the order of their prefixes.
func Standing(ctx context.Context, store binding.Listings) ([]binding.Listing, error) {
	all, err := store.Listed(ctx, 0)
	all = slices.DeleteFunc(all, func(l binding.Listing) bool { return l.Status == "" })
	slices.SortFunc(all, func(a, b binding.Listing) int { return comparePrefix(a, b.Prefix) })
	return all, err
}

// Of gives the one of Standing's entries that counts for a device; nil if there is none.
func Of(all []binding.Listing, imei kme.IMEI) *binding.Listing {
	l, _ := binding.LongestPrefix(imei, func(prefix string) (*binding.Listing, bool) {
		at, ok := slices.BinarySearchFunc(all, prefix, comparePrefix)
		if !ok {
			return nil, false
		}
		return &all[at], true
	})
	return l
}

func comparePrefix(l binding.Listing, prefix string) int { return strings.Compare(l.Prefix, prefix) }
