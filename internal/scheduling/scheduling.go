// Package scheduling fits a process to its work: long calls of a module that computes in it, and short ones of everything else.
package scheduling

import (
	"os"
	"runtime"
)

// ForCalls makes room for calls of a module, so many at a time. Each holds one of the processors of Go's scheduler. When they hold all, they are taken away
// from them behind their backs, and threads stop and start at every call. GOMAXPROCS in the environment stands. It is for after the module was opened.
func ForCalls(n int) {
	if cores := runtime.GOMAXPROCS(0); os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(cores + min(n, 2*cores)) // more are on their way to an HSM elsewhere, and leave the cores alone
	}
}
