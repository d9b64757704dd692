package tokenkeys

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

type generations struct{ all []int }

func (g *generations) StorageGenerations(context.Context) ([]int, error) {
	return slices.Clone(g.all), nil
}

func (g *generations) DestroyStorageKey(_ context.Context, generation int) error {
	g.all = slices.DeleteFunc(g.all, func(o int) bool { return o == generation })
	return nil
}

// resealed is a store in which nothing is sealed under an earlier key. After a failover it may have lost that.
type resealed struct {
	SealedStore
	durable       error
	settled, lost int
}

func (r *resealed) CountSealed(context.Context, []byte) (int, error) {
	if r.settled > 1 {
		return r.lost, nil
	}
	return 0, nil
}

func (r *resealed) Settle(context.Context) error {
	r.settled++
	return r.durable
}

// No key is destroyed under which KMEs are sealed that a failover would bring back.
func TestRetireOnlyWhatIsDurable(t *testing.T) { synctest.Test(t, retireOnlyWhatIsDurable) }

func retireOnlyWhatIsDurable(t *testing.T) {
	token, away := &generations{[]int{1, 2}}, errors.New("the standby is away")
	if destroyed, err := RetireStorage(t.Context(), token, &resealed{durable: away}); !errors.Is(err, away) ||
		len(destroyed) > 0 || len(token.all) != 2 {
		t.Errorf("destroyed %v, error %v", destroyed, err)
	}
	if destroyed, err := RetireStorage(t.Context(), token, &resealed{lost: 1}); err == nil || len(destroyed) > 0 ||
		len(token.all) != 2 {
		t.Errorf("after a failover: destroyed %v, error %v", destroyed, err)
	}
	destroyed, err := RetireStorage(t.Context(), token, &resealed{})
	if err != nil || !slices.Equal(destroyed, []int{1}) {
		t.Errorf("destroyed %v, error %v", destroyed, err)
	}
}
