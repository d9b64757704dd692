package custody

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// maxShare is more than a share of MaxShares has.
const maxShare = 4 << 10

// ReadFiles takes the shares that custodians have decrypted.
func (q *Quorum) ReadFiles(paths []string) error {
	for _, path := range paths {
		text, err := readShare(path)
		if err != nil {
			return fmt.Errorf("the share cannot be read: %w", err)
		}
		if _, err := q.take(text); err != nil {
			return fmt.Errorf("%s: %w; no PIN was tried", path, err)
		}
	}
	return nil
}

// take adds a share, and wipes its text.
func (q *Quorum) take(text []byte) (*Share, error) {
	defer clear(text)
	s, err := Parse(text)
	if err == nil {
		err = q.Add(s)
	}
	return s, err
}

// readShare reads a file, or a pipe as the shell's <(age -d ...).
func readShare(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := durable.Closed(path, info); err != nil && info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: chmod 0600 it", err)
	}
	return io.ReadAll(io.LimitReader(f, maxShare))
}

// Ask takes shares at a terminal, one at a time and without echo, until there are enough. One that is refused is asked
// for again.
func (q *Quorum) Ask(ctx context.Context, terminal *os.File, say io.Writer) error {
	for {
		split := q.expected()
		switch {
		case split == nil:
			fmt.Fprintf(say, "A share of token %s, by any custodian.\n", q.Token)
		case len(q.shares) == split.Threshold:
			return nil
		default:
			others := ""
			if taken := fmt.Sprint(q.Indexes()); len(q.shares) > 0 {
				others = " but " + strings.Join(strings.Fields(strings.Trim(taken, "[]")), ", ")
			}
			fmt.Fprintf(say, "Share %d of the %d that are needed, of split %s, by any custodian%s.\n", len(q.shares)+1,
				split.Threshold, split.ID, others)
		}
		fmt.Fprint(say, "Paste what age -d prints; it is not shown. Then press Enter: ")
		text, err := readLine(ctx, int(terminal.Fd()))
		fmt.Fprintln(say)
		if err != nil {
			return fmt.Errorf("%w: there are not enough shares, and no PIN was tried", err)
		}
		s, err := q.take(text)
		if err != nil {
			fmt.Fprintf(say, "Not taken: %v.\n", err)
			continue
		}
		fmt.Fprintf(say, "Taken: %v.\n", s)
	}
}

// expected is the split whose shares are asked for; nil if it may be one of several.
func (q *Quorum) expected() *hsmkeys.Split {
	if len(q.shares) == 0 && len(q.Splits) == 1 {
		return &q.Splits[0]
	}
	return q.Split()
}

// readLine reads a line without echo. Whoever gives up with Ctrl-C finds the terminal as it was.
func readLine(ctx context.Context, fd int) ([]byte, error) {
	before, err := term.GetState(fd)
	if err != nil {
		return nil, err
	}
	type result struct {
		line []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		line, err := term.ReadPassword(fd)
		done <- result{line: line, err: err}
	}()
	select {
	case <-ctx.Done():
		return nil, errors.Join(ctx.Err(), term.Restore(fd, before))
	case r := <-done:
		return r.line, r.err
	}
}
