package p11

import (
	"sync"
	"sync/atomic"

	"github.com/miekg/pkcs11"
)

// An Object names an object of a token: its CKA_CLASS, and its CKA_ID or another name of the caller's.
type Object struct {
	Class uint
	ID    string
}

// handles are those that are known. They end with the login.
type handles struct {
	epoch atomic.Int64
	mu    sync.Mutex
	known map[Object]pkcs11.ObjectHandle // another map after each Forget; it and what is in it are guarded by mu
}

// Remembered gives the handle of an object if it is known, or the one that look gives, which is known from then on
// until it is forgotten.
func (h *handles) Remembered(
	o Object, look func() (pkcs11.ObjectHandle, error),
) (pkcs11.ObjectHandle, error) {
	h.mu.Lock()
	known := h.known
	handle, ok := known[o]
	h.mu.Unlock()
	if ok {
		return handle, nil
	}
	handle, err := look()
	if err != nil {
		return 0, err
	}
	h.mu.Lock()
	known[o] = handle // whoever has forgotten meanwhile does not see it
	h.mu.Unlock()
	return handle, nil
}

// Remember makes the handle of an object known, unless something was forgotten since an epoch.
func (h *handles) Remember(epoch int64, o Object, handle pkcs11.ObjectHandle) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.epoch.Load() == epoch {
		h.known[o] = handle
	}
}

// Forget has all objects looked up again by those who ask from now on.
func (h *handles) Forget() {
	h.epoch.Add(1)
	h.mu.Lock()
	h.known = map[Object]pkcs11.ObjectHandle{}
	h.mu.Unlock()
}

// Epoch is another number after each Forget: what was learnt in an earlier one may not hold any more.
func (h *handles) Epoch() int64 { return h.epoch.Load() }
