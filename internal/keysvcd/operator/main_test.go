package operator

import (
	"testing"

	"github.com/kmehsm/kmehsm/binding/sqlstore"
	"github.com/kmehsm/kmehsm/hsmkeys"
	"github.com/kmehsm/kmehsm/internal/must"
	"github.com/kmehsm/kmehsm/internal/softhsmtest"
)

func TestMain(m *testing.M) { softhsmtest.Main(m, 10) }

func newInit(tok softhsmtest.Tok, state string) Init {
	return Init{URI: tok.URI, State: state, Store: sqlstore.InFolder(state), AcceptWeak: true}
}

func withToken(t *testing.T, tok softhsmtest.Tok, f func(*hsmkeys.OperatorToken) error) {
	t.Helper()
	must.Do(t, WithToken(t.Context(), tok.URI, f))
}

// initialise does what keysvc init does.
func initialise(t *testing.T, tok softhsmtest.Tok, state string) {
	t.Helper()
	withToken(t, tok, func(token *hsmkeys.OperatorToken) error {
		_, err := newInit(tok, state).Run(t.Context(), token)
		return err
	})
}
