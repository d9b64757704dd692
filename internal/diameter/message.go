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
	Wx  uint32 = 16777219
	Zh  uint32 = 16777221
	S13 uint32 = 16777252

	capabilitiesExchange uint32 = 257
	deviceWatchdog       uint32 = 280
	disconnectPeer       uint32 = 282
	MultimediaAuth       uint32 = 303
	UpdateLocation       uint32 = 316
	AuthenticationInfo   uint32 = 318
	MEIdentityCheck      uint32 = 324

	ThreeGPP uint32 = 10415
	Own      uint32 = 32473 // RFC 5612: reserved for examples
)

// An ID is the number of an AVP and its vendor's.
type ID struct{ Vendor, Code uint32 }

func base(code uint32) ID     { return ID{Code: code} }
func threeGPP(code uint32) ID { return ID{Vendor: ThreeGPP, Code: code} }
func own(code uint32) ID      { return ID{Vendor: Own, Code: code} }

// AVPs that are made or looked for.
var (
	UserName               = base(1)
	HostIPAddress          = base(257)
	AuthApplicationID      = base(258)
	VendorSpecificApp      = base(260)
	SessionID              = base(263)
	OriginHost             = base(264)
	SupportedVendorID      = base(265)
	VendorID               = base(266)
	ResultCode             = base(268)
	ProductName            = base(269)
	DisconnectCause        = base(273)
	AuthSessionState       = base(277)
	ErrorMessage           = base(281)
	DestinationRealm       = base(283)
	ProxyInfo              = base(284)
	ProxyHost              = base(280)
	ProxyState             = base(33)
	ErrorReportingHost     = base(294)
	OriginRealm            = base(296)
	ExperimentalResult     = base(297)
	ExperimentalResultCode = base(298)
	InbandSecurityID       = base(299)

	SIPNumberAuthItems  = threeGPP(607)
	SIPScheme           = threeGPP(608)
	SIPAuthenticate     = threeGPP(609)
	SIPAuthorization    = threeGPP(610)
	SIPAuthDataItem     = threeGPP(612)
	SupportedFeatures   = threeGPP(628)
	FeatureListID       = threeGPP(629)
	FeatureList         = threeGPP(630)
	ConfidentialityKey  = threeGPP(625)
	IntegrityKey        = threeGPP(626)
	RATType             = threeGPP(1032)
	SubscriptionData    = threeGPP(1400)
	TerminalInformation = threeGPP(1401)
	IMEI                = threeGPP(1402)
	SoftwareVersion     = threeGPP(1403)
	ULRFlags            = threeGPP(1405)
	ULAFlags            = threeGPP(1406)
	VisitedPLMN         = threeGPP(1407)
	RequestedEUTRAN     = threeGPP(1408)
	RequestedUTRAN      = threeGPP(1409)
	NumberOfVectors     = threeGPP(1410)
	ResyncInfo          = threeGPP(1411)
	AuthInfo            = threeGPP(1413)
	EUTRANVector        = threeGPP(1414)
	UTRANVector         = threeGPP(1415)
	GERANVector         = threeGPP(1416)
	SubscriberStatus    = threeGPP(1424)
	EquipmentStatus     = threeGPP(1445)
	RAND                = threeGPP(1447)
	XRES                = threeGPP(1448)
	AUTN                = threeGPP(1449)
	KASME               = threeGPP(1450)
	Kc                  = threeGPP(1453)
	SRES                = threeGPP(1454)
	MEID                = threeGPP(1471)

	BindingRequest = own(1)
	BindingPayload = own(2)
	BindingAttempt = own(3)
	BindingAnswer  = own(4)
	NWSig          = own(5)
	BindingStatus  = own(6)
	BindingControl = own(7)
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
		a := AVP{ID: base(binary.BigEndian.Uint32(b)), Flags: b[4]}
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
