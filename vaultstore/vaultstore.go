// Package vaultstore keeps the public-key directory in HashiCorp Vault, in a KV version 2 secrets engine: each object
// is the field "jws" of a secret at its path. Nothing else of this project talks to Vault.
package vaultstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/kmehsm/kmehsm/directory"
)

// A Store is a directory.Store on one mount. All methods may be called concurrently.
//
// The Vault client repeats requests that may succeed later (rate limits, sealed or unreachable servers, standby nodes
// without a leader), a few times with jitter. If they still fail, the error wraps directory.ErrUnavailable. Other
// failures are not repeated.
type Store struct {
	client  *api.Client
	mount   string
	checked atomic.Bool // the mount has been seen to be KV version 2
}

var _ directory.Store = (*Store)(nil)

// New makes the Store of a mount. The client must be one of Connect: another would take some redirects for answers. It
// sends no request.
func New(client *api.Client, mount string) *Store {
	return &Store{client: client, mount: strings.Trim(mount, "/")}
}

var errNoMount = errors.New("there is no mount")

func (s *Store) data(path string) string { return s.mount + "/data/" + path }

// Create writes with cas=0, which Vault refuses where there is a version. A token that may create but not update gets a
// 403 for that instead; either way it depends on what is there.
func (s *Store) Create(ctx context.Context, path string, data []byte) error {
	err := s.write(ctx, path, data, 0)
	if err == nil || !isCAS(err) && statusOf(err) != http.StatusForbidden {
		return s.explain(err, "create", path)
	}
	have, _, rerr := s.Read(ctx, path)
	switch {
	case errors.Is(rerr, directory.ErrNotFound) && isCAS(err):
		return fmt.Errorf("%s was deleted in Vault, which is not the same as never published: undelete it", path)
	case rerr != nil:
		return s.explain(err, "create", path)
	case !bytes.Equal(have, data):
		return directory.NewConflictError(path, have, data)
	}
	return nil
}

// Update writes with cas=version.
func (s *Store) Update(ctx context.Context, path string, data []byte, version string) error {
	cas := 0
	if version != "" {
		var err error
		if cas, err = strconv.Atoi(version); err != nil {
			return fmt.Errorf("%q is no version of Vault's", version)
		}
	}
	err := s.write(ctx, path, data, cas)
	if isCAS(err) {
		return fmt.Errorf("%s: %w", path, directory.ErrChanged)
	}
	return s.explain(err, "update", path)
}

func (s *Store) write(ctx context.Context, path string, data []byte, cas int) error {
	if err := directory.CheckSize(path, data); err != nil {
		return err
	}
	if err := s.checkMount(ctx); err != nil {
		return err
	}
	body := map[string]any{"options": map[string]any{"cas": cas}, "data": map[string]any{"jws": string(data)}}
	for wait := 50 * time.Millisecond; ; wait *= 2 {
		_, err := s.client.Logical().WriteWithContext(ctx, s.data(path), body)
		if !isUpgrading(err) || wait > 5*time.Second {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// Read gives the newest version. Its version is there, for Update, also with a *directory.RefusedError, and with
// ErrNotFound if somebody has deleted that version.
func (s *Store) Read(ctx context.Context, path string) (data []byte, version string, err error) {
	if err := s.checkMount(ctx); err != nil {
		return nil, "", s.explain(err, "read", path)
	}
	secret, err := s.client.Logical().ReadWithContext(ctx, s.data(path))
	if err != nil {
		return nil, "", s.explain(err, "read", path)
	}
	if secret == nil { // it was never written
		return nil, "", fmt.Errorf("%s: %w", path, directory.ErrNotFound)
	}
	fields, _ := secret.Data["data"].(map[string]any)
	metadata, _ := secret.Data["metadata"].(map[string]any)
	if metadata["version"] != nil {
		version = fmt.Sprint(metadata["version"])
	}
	if secret.Data["data"] == nil { // it was deleted
		return nil, version, fmt.Errorf("%s: %w", path, directory.ErrNotFound)
	}
	jws, ok := fields["jws"].(string)
	if !ok || version == "" {
		return nil, version, &directory.RefusedError{Object: path,
			Reason: "it is no object of ours: it has no field jws"}
	}
	return []byte(jws), version, nil
}

// List gives the names below a path; of a folder and an object of one name, once.
func (s *Store) List(ctx context.Context, path string) ([]string, error) {
	if err := s.checkMount(ctx); err != nil {
		return nil, s.explain(err, "list", path)
	}
	secret, err := s.client.Logical().ListWithContext(ctx, s.mount+"/metadata/"+path)
	if err != nil {
		return nil, s.explain(err, "list", path)
	}
	if secret == nil {
		return nil, nil
	}
	keys, _ := secret.Data["keys"].([]any)
	var names []string
	for _, k := range keys {
		names = append(names, strings.TrimSuffix(fmt.Sprint(k), "/"))
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// checkMount refuses a mount that is not KV version 2: version 1 would take a write and keep no version to compare. Any
// token that may do anything on the mount may ask.
func (s *Store) checkMount(ctx context.Context) error {
	if s.checked.Load() {
		return nil
	}
	secret, err := s.client.Logical().ReadWithContext(ctx, "sys/internal/ui/mounts/"+s.mount)
	if statusOf(err) == http.StatusForbidden || err == nil && secret == nil {
		// To this question Vault answers 403 where there is no mount, and where the token may do nothing on it.
		return fmt.Errorf("%w %s, or this token's policy has nothing on it (403)", errNoMount, s.mount)
	}
	if err != nil {
		return err
	}
	options, _ := secret.Data["options"].(map[string]any)
	if secret.Data["type"] != "kv" || options["version"] != "2" {
		return fmt.Errorf("the Vault mount %s is %v version %v; the directory needs kv version 2: make one with "+
			"factory vault setup", s.mount, secret.Data["type"], options["version"])
	}
	s.checked.Store(true)
	return nil
}

// reasons gives Vault's reasons for a refusal. It leaves out the answers of other servers, such as HTML.
func reasons(r *api.ResponseError) string {
	if r.RawError {
		return "what answers there is no Vault: see that VAULT_ADDR is its address"
	}
	return strings.Join(r.Errors, "; ")
}

func statusOf(err error) int {
	if r, ok := errors.AsType[*api.ResponseError](err); ok {
		return r.StatusCode
	}
	return 0
}

func mentions(err error, status int, text string) bool {
	r, ok := errors.AsType[*api.ResponseError](err)
	return ok && r.StatusCode == status && strings.Contains(strings.Join(r.Errors, " "), text)
}

func isCAS(err error) bool { return mentions(err, http.StatusBadRequest, "check-and-set") }

// isUpgrading: a fresh mount refuses writes for a moment.
func isUpgrading(err error) bool {
	return mentions(err, http.StatusBadRequest, "Upgrading from non-versioned")
}

// explain says what a failure means. It leaves out the client's own message, which has the request's URL.
func (s *Store) explain(err error, what, path string) error {
	var r *api.ResponseError
	var long *http.MaxBytesError
	switch {
	case err == nil || errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s %s: %w: no answer in time: %w", what, path, directory.ErrUnavailable, err)
	case errors.As(err, &long):
		return fmt.Errorf("%s %s: what answers there is no Vault, or has no directory: its answer is longer than %d "+
			"bytes", what, path, long.Limit)
	case !errors.As(err, &r):
		if errors.Is(err, errNoActive) || errors.As(err, new(interface{ Timeout() bool })) { // from the network
			return fmt.Errorf("%s %s: %w: %w", what, path, directory.ErrUnavailable, err)
		}
		return err
	}
	reasons := reasons(r)
	switch {
	case r.StatusCode == http.StatusForbidden:
		return fmt.Errorf("this token may not %s %s in Vault (403): its policy must have that path on mount %s (see "+
			"policies/), or the token has ended", what, s.data(path), s.mount)
	case strings.Contains(reasons, "value being too large") || strings.Contains(reasons, "exceeds allowed length"):
		return fmt.Errorf("%s %s: Vault takes no value of that size: give its storage a max_entry_size, "+
			"and its listener a max_json_string_value_length, of 1 MiB at least: %s", what, path, reasons)
	case r.StatusCode == http.StatusTooManyRequests || r.StatusCode >= 500:
		return fmt.Errorf("%s %s: %w (%d): %s", what, path, directory.ErrUnavailable, r.StatusCode, reasons)
	}
	return fmt.Errorf("%s %s: Vault answers %d: %s", what, path, r.StatusCode, reasons)
}
