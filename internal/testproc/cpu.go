package testproc

import (
	"syscall"
	"testing"

	"github.com/kmehsm/kmehsm/internal/must"
)

// ReportCPU reports the time that all cores spend on an operation from now until done, which whatever else the machine
// does changes least.
func ReportCPU(b *testing.B) (done func()) {
	used := func() (us float64) {
		var u syscall.Rusage
		must.Do(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
		return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e3
	}
	before := used()
	return func() { b.ReportMetric((used()-before)/float64(b.N), "cpu-us/op") }
}
