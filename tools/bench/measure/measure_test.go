package measure

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/kmehsm/kmehsm/internal/testproc"
)

func TestMain(m *testing.M) { testproc.Main(m.Run) }

func TestRatio(t *testing.T) {
	var r Ratio
	for _, pair := range [][2]float64{{100, 50}, {200, 50}, {100, 90}} {
		r.Add(pair[0], pair[1])
	}
	if r.Finish(); r.Share != 0.5 || r.Low != 0.25 || r.High != 0.9 || r.Token != 100 || r.Service != 50 {
		t.Errorf("%+v: the share is not the median of the pairs' shares", r)
	}
}

// What a process has spent counts its children that have ended, as PostgreSQL's connections do.
func TestProcessCPU(t *testing.T) {
	before, err := ProcessCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	child := exec.CommandContext(ctx, "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done")
	if err := child.Run(); err != nil {
		t.Fatal(err)
	}
	after, err := ProcessCPU(os.Getpid())
	if spent := child.ProcessState.UserTime(); err != nil || after-before < spent-20*time.Millisecond || spent == 0 {
		t.Errorf("%v to %v, %v; the child has spent %v", before, after, err, spent)
	}
	if _, err := ProcessCPU(0); err == nil {
		t.Error("there is no process 0")
	}
}
