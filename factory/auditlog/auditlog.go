// Package auditlog is the record of all commands that used the manufacturer's token: a chain of
// lines, whose end the token signs.
package auditlog

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/durable"
	"github.com/kmehsm/kmehsm/internal/strict"
	"github.com/kmehsm/kmehsm/internal/who"
)

// A Log is the file log.jsonl in a folder, and the signature over its last line, log.head.jws.
type Log struct{ Dir string }

// An Entry is a line of the log: a command that has begun, or how one has ended. Previous chains the lines, and the
// token signs the last one at the end of each command; so a line that was changed, removed or moved shows.
type Entry struct {
	Seq      int       `json:"seq"` // counts up from 1
	Time     time.Time `json:"time"`
	Who      string    `json:"who"` // the operating system's user, and the machine
	Process  int       `json:"process"`
	Command  []string  `json:"command"`         // as it was called; no secret is ever on a command line
	Token    string    `json:"token,omitempty"` // serial number
	Result   string    `json:"result"`          // begun, done, or the error
	Previous string    `json:"previous"`        // SHA-256 of the line before, hex; of no bytes for the first
}

// Begun and Done are results; any other is an error's text.
const (
	Begun = "begun"
	Done  = "done"
)

// A Head is a line of the log, as the token signs it.
type Head struct {
	Seq    int    `json:"seq"`
	SHA256 string `json:"sha256"` // of the line, hex
}

const typeHead directory.Type = "kme-audit-log-head+jws"

// File is the name of the log's file. Every line's folder has one.
const File = "log.jsonl"

const (
	headFile = "log.head.jws"
	maxEntry = 64 << 10
)

func lineDigest(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// Record runs a command, f. It logs that the command begins, and how it has ended, and calls sign for the last line. If
// the beginning cannot be logged, f is not run.
func (l Log) Record(command []string, token string, f func() error, sign func(*Head) error) error {
	head, err := l.Append(command, token, Begun)
	if err != nil {
		return err
	}
	result := Done
	if err = f(); err != nil {
		result = err.Error()
	}
	var lerr error
	if _, none := os.Stat(filepath.Join(l.Dir, headFile)); err == nil && errors.Is(none, fs.ErrNotExist) {
		lerr = sign(head) // before the first line that says done: see unsigned
	}
	if lerr == nil {
		head, lerr = l.Append(command, token, result)
	}
	if lerr == nil {
		lerr = sign(head)
	}
	switch {
	case lerr == nil:
		return err
	case err == nil:
		return fmt.Errorf("the command is done, but not in the audit log: %w", lerr)
	}
	return errors.Join(err, fmt.Errorf("how the command has ended is not in the audit log: %w", lerr))
}

// Append adds a line, durably. Several processes may. A result that is too long for a line is cut.
func (l Log) Append(command []string, token, result string) (*Head, error) {
	if err := durable.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, err
	}
	var head *Head
	err := durable.AppendLine(filepath.Join(l.Dir, File), 0o600, func(last []byte) ([]byte, error) {
		var before Entry
		if last != nil {
			if err := json.Unmarshal(last, &before); err != nil {
				return nil, errors.New("its last line is damaged: see factory log verify")
			}
		}
		e := Entry{
			Seq: before.Seq + 1, Time: time.Now().UTC(), Who: who.Name(), Process: os.Getpid(), Command: command,
			Token: token, Result: result, Previous: lineDigest(last),
		}
		line, err := json.Marshal(e)
		for len(line) > maxEntry && result != "" {
			result = strings.ToValidUTF8(result[:len(result)/2], "")
			e.Result = result + "... (cut)"
			line, err = json.Marshal(e)
		}
		if len(line) > maxEntry {
			err = errors.New("the command line is too long for it")
		}
		head = &Head{Seq: before.Seq + 1, SHA256: lineDigest(line)}
		return line, err
	})
	if err != nil {
		return nil, fmt.Errorf("the audit log %s cannot be written: %w", filepath.Join(l.Dir, File), err)
	}
	return head, nil
}

// Sign signs the last line of a command. If commands run side by side, the last signature may not be of the last line:
// then the next command's signature covers that. It refuses a log without the line that was signed last: otherwise the
// token would vouch for a log that somebody has changed.
func (l Log) Sign(s *directory.Signer, head *Head) error {
	if _, err := l.Verify(directory.NewVerifier(s.Public())); err != nil && !l.unsigned(err, head) {
		return fmt.Errorf("the token does not sign it: %w; keep it as it is, find out who wrote to it, and bring back "+
			"%s and %s from one backup", err, File, headFile)
	}
	jws, err := s.Sign(typeHead, head)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(l.Dir, headFile), jws, 0o600)
}

// unsigned says whether Verify has failed only because no signature was made yet: no command was done before the line
// of head. Record signs once before it logs that the first command is done. So if it is interrupted in between, the
// next command can still sign the log.
func (l Log) unsigned(err error, head *Head) bool {
	if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	_, entries, err := l.read()
	return err == nil && !slices.ContainsFunc(entries, func(e Entry) bool {
		return e.Result == Done && e.Seq < head.Seq
	})
}

// A Report is what Verify found of a log that is whole.
type Report struct {
	Lines       int     `json:"lines"`
	Signed      int     `json:"signed"`      // up to this line, the token's signature covers it
	Interrupted []Entry `json:"interrupted"` // commands that have begun and not ended: killed, or still at work
}

// Verify checks that no line was changed, removed or moved. Lines after the signed one, of commands
// that were killed or are at work, are only chained.
func (l Log) Verify(v *directory.Verifier) (*Report, error) {
	path := filepath.Join(l.Dir, headFile)
	jws, unsigned := os.ReadFile(path) // first: what is signed meanwhile is not in a log that was read before
	digests, entries, err := l.read()
	if err != nil {
		return nil, fmt.Errorf("the audit log %s: %w", filepath.Join(l.Dir, File), err)
	}
	if unsigned != nil {
		return nil, fmt.Errorf("the signature over the audit log: %w", unsigned)
	}
	var head Head
	if err := v.Verify(typeHead, path, jws, &head); err != nil {
		return nil, err
	}
	if head.Seq < 1 || head.Seq > len(digests) {
		return nil, fmt.Errorf("the audit log has %d lines, and the token has signed line %d: lines were removed at "+
			"its end", len(digests), head.Seq)
	}
	if digests[head.Seq-1] != head.SHA256 {
		return nil, fmt.Errorf("line %d of the audit log is not the one that the token has signed: it, or one before "+
			"it, was changed", head.Seq)
	}
	r := &Report{Lines: len(digests), Signed: head.Seq, Interrupted: []Entry{}}
	open := map[string]Entry{} // by machine and process
	for _, e := range entries {
		key := fmt.Sprintf("%s %d", e.Who, e.Process)
		if was, ok := open[key]; ok && e.Result == Begun {
			r.Interrupted = append(r.Interrupted, was)
		}
		if delete(open, key); e.Result == Begun {
			open[key] = e
		}
	}
	r.Interrupted = slices.AppendSeq(r.Interrupted, maps.Values(open))
	slices.SortFunc(r.Interrupted, func(a, b Entry) int { return a.Seq - b.Seq })
	return r, nil
}

// read gives the digests of all lines and the entries. It fails if the lines are not a chain. What is behind the last
// line end never counted: see durable.AppendLine.
func (l Log) read() (digests []string, entries []Entry, err error) {
	f, err := os.Open(filepath.Join(l.Dir, File))
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH); err != nil { // no line is half written
		return nil, nil, err
	}
	previous := lineDigest(nil)
	in := bufio.NewScanner(f)
	in.Buffer(nil, maxEntry+1)
	in.Split(func(data []byte, _ bool) (advance int, line []byte, err error) {
		line, _, whole := bytes.Cut(data, []byte("\n"))
		if !whole {
			return 0, nil, nil
		}
		return len(line) + 1, line, nil
	})
	for in.Scan() {
		n := len(digests) + 1
		var e Entry
		if err := strict.Parse(in.Bytes(), &e); err != nil {
			return nil, nil, fmt.Errorf("line %d is no line of the log: %w", n, err)
		}
		if e.Seq != n || e.Previous != previous {
			return nil, nil, fmt.Errorf("line %d, which says that it is number %d, does not follow the line before "+
				"it: a line was changed, removed or moved", n, e.Seq)
		}
		previous = lineDigest(in.Bytes())
		digests, entries = append(digests, previous), append(entries, e)
	}
	return digests, entries, in.Err()
}
