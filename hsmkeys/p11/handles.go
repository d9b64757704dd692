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

// handles caches handles of objects. They are valid as long as the login.
type handles struct {
	epoch atomic.Int64
	mu    sync.Mutex
	known map[Object]pkcs11.ObjectHandle // another map after each Forget; it and what is in it are guarded by mu
}

// Remembered gives the cached handle of an object. If there is none, it calls look, and caches the result until Forget.
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
	known[o] = handle // if Forget came meanwhile, this map is not used any more
	h.mu.Unlock()
	return handle, nil
}

// Remember caches the handle of an object, unless Forget was called since the epoch.
func (h *handles) Remember(epoch int64, o Object, handle pkcs11.ObjectHandle) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.epoch.Load() == epoch {
		h.known[o] = handle
	}
}

// Forget drops all cached handles.
func (h *handles) Forget() {
	h.epoch.Add(1)
	h.mu.Lock()
	h.known = map[Object]pkcs11.ObjectHandle{}
	h.mu.Unlock()
}

// Epoch changes with each Forget: what was found out in an earlier epoch may be wrong now.
func (h *handles) Epoch() int64 { return h.epoch.Load() }
