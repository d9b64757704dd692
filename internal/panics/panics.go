// Package panics turns panics into errors on goroutines where a panic would end the process. Each is logged with its
// stack, and counted, where it is recovered: nobody may be left to get the error.
package panics

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
)

// An Error is a panic that was recovered.
type Error struct{ Value any }

func (e *Error) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// Of is the panic that an error comes from; nil if it comes from none.
func Of(err error) *Error {
	p, _ := errors.AsType[*Error](err)
	return p
}

var count atomic.Int64

// Count is how many panics this process has recovered.
func Count() int64 { return count.Load() }

// Recover makes a panic the error of the function that defers it, if that has one; else it is nil:
//
//	defer panics.Recover(&err)
func Recover(err *error) {
	if p := recover(); p != nil {
		if broken := Recovered(p); err != nil {
			*err = broken
		}
	}
}

// Recovered is the error of a panic that a deferred function has recovered; attrs are for the log.
func Recovered(p any, attrs ...any) *Error {
	count.Add(1)
	attrs = append(attrs, "cause", fmt.Sprint(p), "stack", string(debug.Stack()))
	slog.Error("panic", attrs...)
	return &Error{Value: p}
}
