// Package diameter is a small Diameter peer for tests (RFC 6733, 3GPP TS 29.272 and 29.229): AVPs by hand, one TCP
// connection. It shares nothing with freeDiameter, so that no fault of one stack hides one of ours.
package diameter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Flags of a message and of an AVP.
const (
	Request       byte = 0x80
	Proxiable     byte = 0x40
	Error         byte = 0x20
	Retransmitted byte = 0x10

	vendorFlag byte = 0x80
	mandatory  byte = 0x40
)

// What is known by number: applications, commands, vendors and AVPs.
const (
	S6a uint32 = 16777251
	Cx  uint32 = 16777216
	SWx uint32 = 16777265
	Zh  uint32 = 16777221

	capabilitiesExchange uint32 = 257
	deviceWatchdog       uint32 = 280
	disconnectPeer       uint32 = 282
	MultimediaAuth       uint32 = 303
	UpdateLocation       uint32 = 316
	AuthenticationInfo   uint32 = 318

	ThreeGPP uint32 = 10415
	Own      uint32 = 32473 // RFC 5612: reserved for examples
)

// An ID is the number of an AVP and its vendor's.
type ID struct{ Vendor, Code uint32 }

// AVPs that are made or looked for.
var (
	UserName               = ID{0, 1}
	HostIPAddress          = ID{0, 257}
	AuthApplicationID      = ID{0, 258}
	VendorSpecificApp      = ID{0, 260}
	SessionID              = ID{0, 263}
	OriginHost             = ID{0, 264}
	SupportedVendorID      = ID{0, 265}
	VendorID               = ID{0, 266}
	ResultCode             = ID{0, 268}
	ProductName            = ID{0, 269}
	DisconnectCause        = ID{0, 273}
	AuthSessionState       = ID{0, 277}
	ErrorMessage           = ID{0, 281}
	DestinationRealm       = ID{0, 283}
	ProxyInfo              = ID{0, 284}
	ProxyHost              = ID{0, 280}
	ProxyState             = ID{0, 33}
	ErrorReportingHost     = ID{0, 294}
	OriginRealm            = ID{0, 296}
	ExperimentalResult     = ID{0, 297}
	ExperimentalResultCode = ID{0, 298}
	InbandSecurityID       = ID{0, 299}

	SIPNumberAuthItems  = ID{ThreeGPP, 607}
	SIPScheme           = ID{ThreeGPP, 608}
	SIPAuthenticate     = ID{ThreeGPP, 609}
	SIPAuthorization    = ID{ThreeGPP, 610}
	SIPAuthDataItem     = ID{ThreeGPP, 612}
	SupportedFeatures   = ID{ThreeGPP, 628}
	FeatureListID       = ID{ThreeGPP, 629}
	FeatureList         = ID{ThreeGPP, 630}
	ConfidentialityKey  = ID{ThreeGPP, 625}
	IntegrityKey        = ID{ThreeGPP, 626}
	RATType             = ID{ThreeGPP, 1032}
	SubscriptionData    = ID{ThreeGPP, 1400}
	TerminalInformation = ID{ThreeGPP, 1401}
	IMEI                = ID{ThreeGPP, 1402}
	SoftwareVersion     = ID{ThreeGPP, 1403}
	ULRFlags            = ID{ThreeGPP, 1405}
	ULAFlags            = ID{ThreeGPP, 1406}
	VisitedPLMN         = ID{ThreeGPP, 1407}
	RequestedEUTRAN     = ID{ThreeGPP, 1408}
	RequestedUTRAN      = ID{ThreeGPP, 1409}
	NumberOfVectors     = ID{ThreeGPP, 1410}
	ResyncInfo          = ID{ThreeGPP, 1411}
	AuthInfo            = ID{ThreeGPP, 1413}
	EUTRANVector        = ID{ThreeGPP, 1414}
	UTRANVector         = ID{ThreeGPP, 1415}
	GERANVector         = ID{ThreeGPP, 1416}
	SubscriberStatus    = ID{ThreeGPP, 1424}
	RAND                = ID{ThreeGPP, 1447}
	XRES                = ID{ThreeGPP, 1448}
	AUTN                = ID{ThreeGPP, 1449}
	KASME               = ID{ThreeGPP, 1450}
	Kc                  = ID{ThreeGPP, 1453}
	SRES                = ID{ThreeGPP, 1454}

	BindingRequest = ID{Own, 1}
	BindingPayload = ID{Own, 2}
	BindingAttempt = ID{Own, 3}
	BindingAnswer  = ID{Own, 4}
	NWSig          = ID{Own, 5}
	BindingStatus  = ID{Own, 6}
	BindingControl = ID{Own, 7}
)

// An AVP is one attribute, its data not looked into.
type AVP struct {
	ID
	Flags byte // without the vendor's bit
	Data  []byte
}

// A Message is a command.
type Message struct {
	Flags              byte
	Code, App          uint32
	HopByHop, EndToEnd uint32
	AVPs               []AVP
}

// New makes an AVP with its usual M bit.
func New(id ID, data []byte) AVP {
	flags := mandatory
	switch {
	case id.Vendor == Own, id == SupportedFeatures, id == FeatureList, id == FeatureListID, id == ProductName,
		id == ErrorMessage, id == ErrorReportingHost:
		flags = 0
	}
	return AVP{ID: id, Flags: flags, Data: data}
}

// Text makes an AVP of text.
func Text(id ID, s string) AVP { return New(id, []byte(s)) }

// Number makes an Unsigned32, or an Enumerated.
func Number(id ID, n uint32) AVP { return New(id, binary.BigEndian.AppendUint32(nil, n)) }

// Group makes a Grouped AVP.
func Group(id ID, avps ...AVP) AVP { return New(id, appendAVPs(nil, avps)) }

func appendAVPs(b []byte, avps []AVP) []byte {
	for _, a := range avps {
		size, flags := 8+len(a.Data), a.Flags
		if a.Vendor != 0 {
			size, flags = size+4, flags|vendorFlag
		}
		b = binary.BigEndian.AppendUint32(b, a.Code)
		b = binary.BigEndian.AppendUint32(b, uint32(flags)<<24|uint32(size))
		if a.Vendor != 0 {
			b = binary.BigEndian.AppendUint32(b, a.Vendor)
		}
		b = append(b, a.Data...)
		b = append(b, make([]byte, -len(a.Data)&3)...)
	}
	return b
}

// Bytes is the message as it is sent.
func (m *Message) Bytes() []byte {
	b := binary.BigEndian.AppendUint32(nil, 0) // version and length
	b = binary.BigEndian.AppendUint32(b, uint32(m.Flags)<<24|m.Code&0xffffff)
	b = binary.BigEndian.AppendUint32(b, m.App)
	b = binary.BigEndian.AppendUint32(b, m.HopByHop)
	b = appendAVPs(binary.BigEndian.AppendUint32(b, m.EndToEnd), m.AVPs)
	binary.BigEndian.PutUint32(b, 1<<24|uint32(len(b)))
	return b
}

// ParseAVPs reads AVPs: those of a message, or a group's.
func ParseAVPs(b []byte) (avps []AVP, err error) {
	for len(b) > 0 {
		if len(b) < 8 {
			return nil, errors.New("an AVP is shorter than its header")
		}
		a := AVP{ID: ID{0, binary.BigEndian.Uint32(b)}, Flags: b[4]}
		head, size := 8, int(binary.BigEndian.Uint32(b[4:])&0xffffff)
		if a.Flags&vendorFlag != 0 {
			head = 12
		}
		padded := (size + 3) &^ 3
		if size < head || padded > len(b) {
			return nil, fmt.Errorf("AVP %d has length %d, of %d that are left", a.Code, size, len(b))
		}
		if head == 12 {
			a.Flags &^= vendorFlag
			if a.Vendor = binary.BigEndian.Uint32(b[8:]); a.Vendor == 0 {
				return nil, fmt.Errorf("AVP %d has the V bit, and no vendor", a.Code)
			}
		}
		a.Data = b[head:size]
		avps, b = append(avps, a), b[padded:]
	}
	return avps, nil
}

// Parse reads a whole message.
func Parse(b []byte) (*Message, error) {
	if len(b) < 20 || binary.BigEndian.Uint32(b) != 1<<24|uint32(len(b)) || len(b)%4 != 0 {
		return nil, errors.New("no message of version 1 and of its own length")
	}
	m := &Message{
		Flags: b[4], Code: binary.BigEndian.Uint32(b[4:]) & 0xffffff, App: binary.BigEndian.Uint32(b[8:]),
		HopByHop: binary.BigEndian.Uint32(b[12:]), EndToEnd: binary.BigEndian.Uint32(b[16:]),
	}
	var err error
	m.AVPs, err = ParseAVPs(b[20:])
	return m, err
}

const maxMessage = 1 << 20

func read(r io.Reader) (*Message, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(head[:]) & 0xffffff)
	if size < 20 || size > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes", size)
	}
	b := append(head[:], make([]byte, size-4)...)
	if _, err := io.ReadFull(r, b[4:]); err != nil {
		return nil, err
	}
	return Parse(b)
}

// All finds AVPs; of several IDs, those within the ones before. What is damaged within has none.
func All(avps []AVP, path ...ID) (found []AVP) {
	for _, a := range avps {
		if a.ID != path[0] {
			continue
		}
		if len(path) == 1 {
			found = append(found, a)
		} else if in, err := ParseAVPs(a.Data); err == nil {
			found = append(found, All(in, path[1:]...)...)
		}
	}
	return found
}

// All finds AVPs of a message, as the function does.
func (m *Message) All(path ...ID) []AVP { return All(m.AVPs, path...) }

// Data gives the data of the first such AVP, nil without one.
func (m *Message) Data(path ...ID) []byte {
	if all := m.All(path...); len(all) > 0 {
		return slices.Clip(all[0].Data)
	}
	return nil
}

// Number gives an Unsigned32.
func (m *Message) Number(path ...ID) (n uint32, ok bool) {
	data := m.Data(path...)
	if len(data) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(data), true
}

// Result is Result-Code or Experimental-Result-Code, 0 without either.
func (m *Message) Result() uint32 {
	if n, ok := m.Number(ResultCode); ok {
		return n
	}
	n, _ := m.Number(ExperimentalResult, ExperimentalResultCode)
	return n
}
