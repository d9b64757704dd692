package p11

// #include <stdlib.h>
import "C"

import (
	"fmt"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
	"github.com/kmehsm/kmehsm/internal/usage"
)

// A module is a PKCS #11 library in this process. It stays loaded. C_Initialize and C_Finalize are called once for all
// [Token]s that use it at the same time: by crypto11 if it can. We call them if the library needs a string, or if it
// keeps a state of its own for each caller that has asked it for its functions, as p11-kit's client does.
type module struct {
	*pkcs11.Ctx
	functions ck.Functions

	// held during C_Initialize and C_Finalize: nobody else can do anything before they have ended
	mu    sync.Mutex
	users int // guarded by mu
	// we called C_Initialize; if not, crypto11 did, and calls C_Finalize, too; guarded by mu
	ours     bool
	reserved string // what C_Initialize was given; guarded by mu
}

// modules are those that are loaded, by their paths.
var modules struct {
	sync.Mutex
	at map[string]*module
}

func loadModule(path string) (_ *module, err error) {
	defer func() { err = usage.Mark(err) }()
	modules.Lock()
	defer modules.Unlock()
	if m := modules.at[path]; m != nil {
		return m, nil
	}
	ctx := pkcs11.New(path)
	if ctx == nil {
		return nil, fmt.Errorf("the PKCS #11 module %s cannot be used: it is no library, or none of PKCS #11", path)
	}
	functions, err := ck.FunctionsOf(ctx)
	if err != nil {
		ctx.Destroy()
		return nil, err
	}
	if modules.at == nil {
		modules.at = map[string]*module{}
	}
	m := &module{Ctx: ctx, functions: functions}
	modules.at[path] = m
	return m, nil
}

// initialize calls C_Initialize for the first user, with the URI's string as pReserved, if it has one.
func (m *module) initialize(reserved string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users == 0 {
		var options []pkcs11.InitializeOption
		if reserved != "" {
			p := unsafe.Pointer(C.CString(reserved))
			defer C.free(p)
			options = append(options, pkcs11.InitializeWithReserved(p))
		}
		err := m.Initialize(options...)
		m.ours = err == nil
		if err != nil && (reserved != "" || !ck.IsCKR(err, pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
			return err
		}
		m.reserved = reserved
	} else if reserved != m.reserved {
		return fmt.Errorf("it is in use in this process with another %s: a module takes one, for all of its tokens",
			initReserved)
	}
	m.users++
	return nil
}

// finalize calls C_Finalize for the last user.
func (m *module) finalize() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users > 0 || !m.ours {
		return nil
	}
	return m.Finalize()
}
