package panics

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

// Each panic is logged with its stack, and counted, once, wherever its error goes; also where nobody gets it.
func TestRecover(t *testing.T) {
	log, before := testproc.Logged(t), Count()
	err := func() (err error) {
		defer Recover(&err)
		err = func() (err error) {
			defer Recover(&err)
			panic("inner")
		}()
		return fmt.Errorf("outer: %w", err)
	}()
	if p := Of(err); p == nil || p.Value != "inner" || err.Error() != "outer: panic: inner" {
		t.Errorf("%v", err)
	}
	func() {
		defer Recover(nil)
		panic("of nobody")
	}()
	none := func() (err error) {
		defer Recover(&err)
		return errors.New("no panic")
	}()
	if Of(none) != nil || none.Error() != "no panic" {
		t.Errorf("%v", none)
	}
	if n := Count() - before; n != 2 {
		t.Errorf("%d panics are counted", n)
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	for i, value := range []string{"inner", "of nobody"} {
		if len(lines) != 2 || !strings.Contains(lines[i], `"msg":"panic","cause":"`+value+`"`) ||
			!strings.Contains(lines[i], "panics_test.go") {
			t.Errorf("the log: %q", lines)
		}
	}
}
