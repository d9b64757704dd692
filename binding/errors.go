package binding

import (
	"context"
	"errors"
	"fmt"

	"github.com/kmehsm/kmehsm/directory"
	"github.com/kmehsm/kmehsm/internal/panics"
	"github.com/kmehsm/kmehsm/kme"
)

// A Refusal is an error with the reason and message that the caller gets, and the cause that only the log gets.
type Refusal struct {
	Reason  kme.Reason
	Message string
	Cause   error

	logged bool
}

func (r *Refusal) Error() string {
	if r.Cause != nil {
		return fmt.Sprintf("%s: %s: %v", r.Reason, r.Message, r.Cause)
	}
	return fmt.Sprintf("%s: %s", r.Reason, r.Message)
}

func (r *Refusal) Unwrap() error { return r.Cause }

func refuse(reason kme.Reason, message string, cause error) *Refusal {
	return &Refusal{Reason: reason, Message: message, Cause: cause}
}

func otherDevice() *Refusal {
	return refuse(kme.OtherDevice, "the IMSI is bound to a device: an administrator has to open provisioning first",
		nil)
}

func unknownDevice() *Refusal {
	return refuse(kme.UnknownDevice, "the IMEI is in no lot that this operator has", nil)
}

func deviceRevoked() *Refusal {
	return refuse(kme.RevokedDevice, "the manufacturer has revoked the device", nil)
}

func mayNotProvision() *Refusal {
	return refuse(kme.CallerNotAllowed, "no device may be provisioned from this origin", nil)
}

// revocationsUnknown is the refusal if it is not known whether a device is revoked.
func revocationsUnknown(cause error) *Refusal {
	return refuse(kme.DirectoryUnavailable, "whether the device was revoked is not known", cause)
}

// rejected is the one answer to every payload whose content is not good. Only its cause differs, and that stays here.
func rejected(cause error) *Refusal {
	return refuse(kme.KMERejected, "the payload was not accepted", cause)
}

// unavailable refuses a call because of an error. The caller's own deadline or cancellation, and a panic, are returned
// as they are: nothing is unavailable then.
func unavailable(ctx context.Context, reason kme.Reason, message string, err error) error {
	switch {
	case panics.Of(err) != nil:
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return refuse(reason, message, err)
}

// fromStore turns a Store's error into a refusal.
func fromStore(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNotBound):
		return refuse(kme.NotBound, "the IMSI has no binding", nil)
	case errors.Is(err, ErrNoAttempt):
		return refuse(kme.NoAttempt, "no such attempt is open for this IMSI", nil)
	case errors.Is(err, ErrBound):
		return otherDevice()
	case errors.Is(err, ErrSpent):
		return refuse(kme.Malformed, "the IMSI was sent this RAND in clear before: make another one", nil)
	case errors.Is(err, ErrUsed):
		return rejected(err)
	case errors.Is(err, ErrRolledBack):
		return refuse(kme.RolledBack, "the database is an earlier one than the service has written: an administrator "+
			"has to settle that", err)
	case IsDamaged(err):
		return refuse(kme.Damaged, "what the database has about this is not what the service wrote: an administrator "+
			"has to settle that", err)
	}
	return unavailable(ctx, kme.StoreUnavailable, "the database is not available", err)
}

func fromToken(ctx context.Context, err error) error {
	return unavailable(ctx, kme.HSMUnavailable, "the HSM is not available", err)
}

func fromDirectory(ctx context.Context, err error) error {
	if errors.Is(err, directory.ErrUnknownDevice) && ctx.Err() == nil {
		return refuse(kme.UnknownDevice, "the IMEI is not in its lot's directory", err)
	}
	return unavailable(ctx, kme.DirectoryUnavailable, "the device's public key cannot be had", err)
}

func overloaded(message string) *Refusal { return refuse(kme.Overloaded, message, nil) }
