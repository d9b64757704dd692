// Package rowmac makes the MACs of a database's rows.
package rowmac

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"sync"

	"github.com/kmehsm/kmehsm/kme"
)

// size is that of HMAC-SHA-256-128 (RFC 4868 section 2.3).
const size = 16

// A Key makes MACs. It may be used concurrently.
type Key struct{ pool sync.Pool }

type state struct {
	hash.Hash
	in  []byte
	sum []byte
}

// New makes a Key of a secret, which must not be wiped before the last MAC.
func New(key kme.Secret) *Key {
	return &Key{pool: sync.Pool{New: func() any { return &state{Hash: hmac.New(sha256.New, key.Bytes())} }}}
}

// Of is the MAC of values under a name: nil, int64, string and []byte. Each has its kind and length before it, so that
// no two rows are alike.
func (k *Key) Of(name string, values ...any) []byte {
	st := k.pool.Get().(*state)
	defer k.pool.Put(st)
	in := st.in[:0]
	text := func(kind byte, s string) {
		in = binary.BigEndian.AppendUint32(append(in, kind), uint32(len(s)))
		in = append(in, s...)
	}
	text('s', name)
	for _, v := range values {
		switch v := v.(type) {
		case nil:
			in = append(in, 'n')
		case int64:
			in = binary.BigEndian.AppendUint64(append(in, 'i'), uint64(v))
		case string:
			text('s', v)
		case []byte:
			in = binary.BigEndian.AppendUint32(append(in, 'b'), uint32(len(v)))
			in = append(in, v...)
		default: // of no column of ours
			text('?', fmt.Sprintf("%T", v))
		}
	}
	st.in = in
	st.Reset()
	st.Write(in)
	st.sum = st.Sum(st.sum[:0])
	return bytes.Clone(st.sum[:size])
}
