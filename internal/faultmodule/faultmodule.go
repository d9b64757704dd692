// Package faultmodule builds, for tests, a PKCS #11 module around another one that fails, hangs and delays when told
// to. See module/fault.c for what it can be told.
package faultmodule

import (
	"embed"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/must"
)

//go:embed module
var source embed.FS

// A Module is a built one. The process that loads it must have Env in its environment.
type Module struct {
	Path, control, counts, inner string
	headers                      string // their folder
	functions                    []string
}

// Build builds one around the module at path, in a folder of the test's.
func Build(dir, path string) (*Module, error) {
	m, err := Built(dir, path)
	if err != nil {
		return nil, err
	}
	sources, err := os.MkdirTemp(dir, "")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(sources)
	if err := os.CopyFS(sources, source); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(sources, "module", "*.c"))
	if err != nil {
		return nil, err
	}
	args := append([]string{"-std=gnu11", "-O2", "-Wall", "-Wno-cast-function-type", "-fPIC", "-shared",
		"-fvisibility=hidden", "-I", m.headers, "-o", m.Path}, files...)
	cmd := exec.Command("gcc", append(args, "-ldl", "-pthread")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("gcc: %w: %s", err, out)
	}
	return m, nil
}

// Built is what Build has built, for another process.
func Built(dir, path string) (*Module, error) {
	headers, err := Headers()
	if err != nil {
		return nil, err
	}
	list, err := os.ReadFile(filepath.Join(headers, "pkcs11f.h"))
	if err != nil {
		return nil, err
	}
	m := &Module{Path: filepath.Join(dir, "fault.so"), control: filepath.Join(dir, "control"),
		counts: filepath.Join(dir, "counts"), inner: path, headers: headers}
	for _, match := range regexp.MustCompile(`CK_PKCS11_FUNCTION_INFO\((C_\w+)\)`).FindAllSubmatch(list, -1) {
		m.functions = append(m.functions, string(match[1]))
	}
	return m, nil
}

// Headers is the folder of pkcs11.h.
func Headers() (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return "", fmt.Errorf("the folder of pkcs11.h: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Env is what the module reads at its loading.
func (m *Module) Env() []string {
	return []string{"KMEHSM_FAULT_MODULE=" + m.inner, "KMEHSM_FAULT_CONTROL=" + m.control,
		"KMEHSM_FAULT_COUNTS=" + m.counts}
}

// URI is the token's URI by way of this module.
func (m *Module) URI(token string) string {
	return regexp.MustCompile(`module-path=[^&]*`).ReplaceAllLiteralString(token, "module-path="+m.Path)
}

// Set makes the module do as the lines say, from the next call on; no lines make it well again.
func (m *Module) Set(lines ...string) error {
	next := m.control + ".next" // in one step: the module reads it meanwhile
	if err := os.WriteFile(next, []byte(strings.Join(append(lines, ""), "\n")), 0o600); err != nil {
		return err
	}
	return os.Rename(next, m.control)
}

// Tell is Set for a test.
func (m *Module) Tell(t testing.TB, lines ...string) {
	t.Helper()
	must.Do(t, m.Set(lines...))
}

// Counts gives how often each function was called so far.
func (m *Module) Counts() map[string]uint64 {
	all := map[string]uint64{}
	data, _ := os.ReadFile(m.counts)
	for i := 0; i+8 <= len(data) && i/8 < len(m.functions); i += 8 {
		if n := binary.NativeEndian.Uint64(data[i:]); n > 0 {
			all[m.functions[i/8]] = n
		}
	}
	return all
}

// Figures are what the module counts beside calls, since it was loaded; in the order in which it has them.
type Figures struct {
	Longest      uint64        // how many calls came one after the other: each began when the one before had ended
	Decryptions  uint64        // RSA decryptions, of a "network"
	Replayed     uint64        // decryptions that were not computed
	Idle         time.Duration // how long a "network" could have taken another call, and there was none
	MostSessions uint64        // that were open at a time
	MostObjects  uint64        // session objects that were there at a time
	Refused      uint64        // sessions and objects, by "limits"
	Sessions     uint64        // that are open
	Objects      uint64        // session objects that are there
}

// Figures gives them as they are now.
func (m *Module) Figures() (f Figures) {
	data, _ := os.ReadFile(m.counts)
	if at := 8 * len(m.functions); at < len(data) {
		binary.Decode(data[at:], binary.NativeEndian, &f)
	}
	return f
}

// Of says how many calls an operation makes by way of the module, by function, and how many of them come one after the
// other on its longest way. Nothing else may call the module meanwhile. Calls that are beside one another are seen as
// that only if they take long enough to meet: with a "delay", or on a "network".
func (m *Module) Of(operation func() error) (calls map[string]uint64, depth uint64, err error) {
	before, longest := m.Counts(), m.Figures().Longest
	err = operation()
	calls, depth = m.Counts(), m.Figures().Longest-longest
	for f := range calls {
		if calls[f] -= before[f]; calls[f] == 0 {
			delete(calls, f)
		}
	}
	return calls, depth, err
}

// Setenv puts Env into the environment of this process.
func (m *Module) Setenv() error {
	for _, v := range m.Env() {
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return nil
}
