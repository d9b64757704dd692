package p11

// #include <stdlib.h>
import "C"

import (
	"fmt"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/kmehsm/kmehsm/hsmkeys/ck"
)

// A module is a PKCS #11 library in this process. It stays loaded. C_Initialize and C_Finalize are made once for all
// [Token]s that use it at a time: by crypto11 where it can, and by ourselves where the library wants a string of its
// own, or keeps those apart who have asked it for its functions, as p11-kit's client does.
type module struct {
	*pkcs11.Ctx
	functions ck.Functions

	// held over C_Initialize and C_Finalize: whoever comes meanwhile can do nothing before they have ended
	mu    sync.Mutex
	users int // guarded by mu
	// C_Initialize was this call; if not, it was crypto11's, which makes C_Finalize too; guarded by mu
	ours     bool
	reserved string // what C_Initialize was given; guarded by mu
}

// modules are those that are loaded, by their paths.
var modules struct {
	sync.Mutex
	at map[string]*module
}

func loadModule(path string) (_ *module, err error) {
	defer func() { err = Setting(err) }()
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

// initialize makes C_Initialize for the first user, with a string of the module's own as pReserved if there is one.
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

// finalize makes C_Finalize for the last user.
func (m *module) finalize() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.users--; m.users > 0 || !m.ours {
		return nil
	}
	return m.Finalize()
}
