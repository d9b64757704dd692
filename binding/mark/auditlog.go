package mark

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/internal/durable"
)

// An audit log is a folder outside of the database: a file for each day, in which each line is an entry of the ledger
// as JSON, or a Mark: everything up to there is in the folder, from the first Mark on. An incomplete line does not
// count. The folder need not be trusted: each entry has a MAC, which also covers the entry before it.
const (
	auditSuffix = ".jsonl"
	auditDay    = "2006-01-02"
	markBegins  = `{"epoch":`
)

// copyEvery is how often a service looks for new entries, and copyMost how many of a chain it copies at once.
const (
	copyEvery = time.Second
	copyMost  = 1000
)

// KeepAuditLog is for a service: until the context ends it copies new entries of the ledger, of all processes, to an
// audit log. A new audit log begins with the next entry. Errors are logged, and failing is told whether there is one.
func KeepAuditLog(ctx context.Context, store binding.Ledger, dir string, failing *atomic.Bool, log *slog.Logger) {
	a, say := &auditLog{store: store, dir: dir}, sayer(ctx, log)
	tick := time.NewTicker(copyEvery)
	defer tick.Stop()
	for {
		err := a.copy(ctx)
		failing.Store(err != nil && ctx.Err() == nil)
		say("writing the audit log", err)
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := a.copy(last); err != nil {
				log.Warn("the audit log was not written at the end", "cause", err.Error())
			}
			return
		case <-tick.C:
		}
	}
}

type auditLog struct {
	store binding.Ledger
	dir   string
	upTo  *binding.Mark // what is in the folder; nil: not read yet
}

// copy writes all entries that are not in the folder yet.
func (a *auditLog) copy(ctx context.Context) error {
	if a.upTo == nil {
		if err := a.begin(ctx); err != nil {
			return err
		}
	}
	for {
		lines, err := a.store.Lines(ctx, a.upTo, copyMost)
		if err != nil || len(lines) == 0 {
			return err
		}
		upTo := *a.upTo
		var text bytes.Buffer
		out := json.NewEncoder(&text)
		for _, l := range lines {
			upTo.Heads[l.Chain] = binding.Head{Seq: l.Seq, MAC: l.MAC}
			if err := out.Encode(l); err != nil {
				return err
			}
		}
		if err := a.add(text.Bytes(), &upTo); err != nil {
			return err
		}
	}
}

// begin finds out which entries the folder has. An empty folder begins at the present end of the ledger.
func (a *auditLog) begin(ctx context.Context) error {
	if err := durable.Mkdir(a.dir, 0o700); err != nil {
		return err
	}
	files, err := auditLogFiles(a.dir)
	if err != nil {
		return err
	}
	for _, file := range slices.Backward(files) {
		var last *binding.Mark
		err := eachLine(file, func(line []byte) error {
			if m := new(binding.Mark); bytes.HasPrefix(line, []byte(markBegins)) && json.Unmarshal(line, m) == nil {
				last = m
			}
			return nil
		})
		if err != nil {
			return err
		}
		if last != nil {
			a.upTo = last
			return nil
		}
	}
	if _, err := a.store.Lines(ctx, new(binding.Mark), 0); err != nil { // of a ledger that is rolled back
		return err
	}
	now, err := a.store.Heads(ctx)
	if err != nil {
		return err
	}
	return a.add(nil, now)
}

// add writes lines and their mark, durably.
func (a *auditLog) add(lines []byte, upTo *binding.Mark) error {
	mark, err := json.Marshal(upTo)
	if err != nil {
		return err
	}
	path := filepath.Join(a.dir, time.Now().UTC().Format(auditDay)+auditSuffix)
	both := func([]byte) ([]byte, error) { return append(lines, mark...), nil }
	if err := durable.AppendLine(path, 0o600, both); err != nil {
		return err
	}
	a.upTo = upTo
	return nil
}

func auditLogFiles(dir string) ([]string, error) {
	all, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range all { // sorted by their names
		if strings.HasSuffix(e.Name(), auditSuffix) && e.Type().IsRegular() {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, nil
}

// longestLine is longer than an entry or a mark can be.
const longestLine = 1 << 20

// eachLine reads complete lines. It skips lines that are longer than longestLine.
func eachLine(path string, f func(line []byte) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	in, skipped := bufio.NewReaderSize(file, longestLine), false
	for {
		line, err := in.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			skipped = true
			continue
		case err != nil && !errors.Is(err, io.EOF):
			return fmt.Errorf("%s: %w", path, err)
		case !skipped && len(line) > 0:
			if err := f(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
				return err
			}
		}
		if skipped = false; err != nil {
			return nil
		}
	}
}

// ErrNoAuditLog: the folder of an audit log does not exist.
var ErrNoAuditLog = errors.New("there is no audit log")

// readAuditLogs gives the entries of audit logs that come after the heads of a ledger, by chain and number.
func readAuditLogs(dirs []string, heads *binding.Mark) (func(chain int, seq int64) []binding.Line, error) {
	type place struct {
		chain int
		seq   int64
	}
	all := map[place][]binding.Line{}
	for _, dir := range dirs {
		files, err := auditLogFiles(dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w at %s: if it is lost, make an empty folder there: then what was decided since "+
				"is not known", ErrNoAuditLog, dir)
		}
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			err := eachLine(file, func(line []byte) error {
				var l binding.Line
				if bytes.HasPrefix(line, []byte(markBegins)) || json.Unmarshal(line, &l) != nil || l.Chain < 0 ||
					l.Chain >= binding.Chains || l.Seq <= heads.Heads[l.Chain].Seq {
					return nil
				}
				at := place{chain: l.Chain, seq: l.Seq}
				if !slices.ContainsFunc(all[at], func(o binding.Line) bool { return bytes.Equal(o.MAC, l.MAC) }) {
					all[at] = append(all[at], l)
				}
				return nil
			})
			if err != nil {
				return nil, err
			}
		}
	}
	return func(chain int, seq int64) []binding.Line { return all[place{chain: chain, seq: seq}] }, nil
}
