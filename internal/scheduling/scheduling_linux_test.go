package scheduling

import (
	"os"
	"runtime"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

func TestForCalls(t *testing.T) {
	for _, c := range []struct {
		env  string
		n    int
		want func(cores int) int
	}{
		{"", 0, func(cores int) int { return cores }},
		{"", 1, func(cores int) int { return cores + 1 }},
		{"", 1000, func(cores int) int { return 3 * cores }},
		{"7", 1000, func(cores int) int { return cores }},
	} {
		t.Setenv("GOMAXPROCS", c.env)
		cores := runtime.GOMAXPROCS(0)
		err := ForCalls(c.n)
		if got := runtime.GOMAXPROCS(cores); got != c.want(cores) || err != nil {
			t.Errorf("%+v: %d processors instead of %d, with %d cores, %v", c, got, c.want(cores), cores, err)
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		id, err := strconv.Atoi(task.Name())
		if err != nil {
			t.Fatal(err)
		}
		if attr, err := unix.SchedGetAttr(id, 0); err != nil || attr.Policy != unix.SCHED_BATCH {
			t.Errorf("thread %d: %+v, %v", id, attr, err)
		}
	}
}
