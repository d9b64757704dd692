// Package usage marks errors in how a program was called or configured. It ends with exit code 2 then.
package usage

import "fmt"

// An Error is about what a program was told: a flag, a setting, or a folder, store or token that one of them names.
type Error struct{ error }

func (e Error) Unwrap() error { return e.error }

// Mark makes an error, unless it is nil, an Error.
func Mark(err error) error {
	if err == nil {
		return nil
	}
	return Error{error: err}
}

// Errorf is [fmt.Errorf] for an Error.
func Errorf(format string, args ...any) error { return Mark(fmt.Errorf(format, args...)) }

// An About is an error about what a setting says: another value of it may help. Its text does not have the setting's
// name; cmdline puts the flag of that name before it.
type About struct {
	Setting string
	error
}

func (a About) Unwrap() error { return a.error }

// In makes an error, unless it is nil, one about a setting.
func In(setting string, err error) error {
	if err == nil {
		return nil
	}
	return About{Setting: setting, error: err}
}
