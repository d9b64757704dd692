// Package panics turns panics into errors on goroutines where a panic would end the process.
package panics

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// An Error is a panic that was recovered.
type Error struct {
	Value any
	Stack []byte // of the goroutine that panicked; for a log
}

func (e *Error) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// Of is the panic that an error comes from; nil if it comes from none.
func Of(err error) *Error {
	p, _ := errors.AsType[*Error](err)
	return p
}

// Recover makes a panic the error of the function that defers it:
//
//	defer panics.Recover(&err)
func Recover(err *error) {
	if p := recover(); p != nil {
		*err = &Error{Value: p, Stack: debug.Stack()}
	}
}
