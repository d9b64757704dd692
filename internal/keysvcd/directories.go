package keysvcd

import (
	"cmp"
	"context"
	"log/slog"

	"github.com/kmehsm/kmehsm/binding"
	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/cmdline"
	"github.com/kmehsm/kmehsm/vaultstore"
)

// OpenLots gives the lots of a store for a command: their directories are read anew, and nothing is remembered of them.
// fallback is the directory of manufacturers that were enrolled without one.
func OpenLots(ctx context.Context, store binding.Registry, fallback string, login vaultstore.Login, log *slog.Logger) (*binding.Lots, error) {
	none := func(string) directory.ReaderOptions { return directory.ReaderOptions{} }
	return binding.OpenLots(ctx, store, opener(ctx, fallback, login, none, log))
}

// opener gives the reader of a manufacturer's directory, the same one at each reload: what it has cached stays, and so
// does the login. It is for one goroutine at a time.
func opener(ctx context.Context, fallback string, login vaultstore.Login,
	options func(manufacturer string) directory.ReaderOptions, log *slog.Logger,
) func(m *binding.Manufacturer) (*directory.Reader, error) {
	stores, readers := map[string]directory.Store{}, map[string]*directory.Reader{}
	return func(m *binding.Manufacturer) (*directory.Reader, error) {
		name := cmp.Or(m.Directory, fallback)
		if name == "" {
			return nil, cmdline.Usagef("manufacturer %s was enrolled without a directory: name one with directory in "+
				"the configuration or --directory, or enroll again with --directory", m.KeyID)
		}
		key := m.KeyID + " " + name
		if readers[key] != nil {
			return readers[key], nil
		}
		if stores[name] == nil {
			store, err := cmdline.OpenDirectory(ctx, name, login, log)
			if err != nil {
				return nil, err
			}
			stores[name] = store
		}
		verifier, err := directory.ParseVerifier([]byte(m.PEM))
		if err != nil {
			return nil, err
		}
		readers[key] = directory.NewReader(stores[name], verifier, options(m.KeyID))
		return readers[key], nil
	}
}
