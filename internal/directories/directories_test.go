package directories

import (
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func TestNames(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]struct {
		good, there bool
		mount       string
	}{
		"file:" + dir:          {true, true, ""},
		"file:" + dir + "/not": {true, false, ""},
		"vault:keys":           {true, true, "keys"},
		"vault:a/b c":          {false, true, ""},
		"file:":                {false, false, ""},
		"vault:":               {false, true, ""},
		dir:                    {false, true, ""},
	} {
		if got := Check(name) == nil; got != want.good {
			t.Errorf("%s: good: %v", name, got)
		}
		if got := There(name) == nil; got != want.there {
			t.Errorf("%s: there: %v", name, got)
		}
		if got := Mount(name); got != want.mount {
			t.Errorf("%s: mount %q", name, got)
		}
	}
}
