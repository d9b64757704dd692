package kme

// A Reason is what a caller of the service may learn about a refusal. It stands in the header ReasonHeader of the
// response, and in the google.rpc.ErrorInfo of the error, domain ErrorDomain.
type Reason string

const (
	ReasonHeader = "Kme-Reason" // of the response to a call that is refused
	ErrorDomain  = "kme"
)

// The reasons.
const (
	Malformed            Reason = "MALFORMED"
	NoAttempt            Reason = "NO_ATTEMPT"
	UnknownDevice        Reason = "UNKNOWN_DEVICE"
	RevokedDevice        Reason = "REVOKED_DEVICE"
	OtherDevice          Reason = "OTHER_DEVICE"
	KMERejected          Reason = "KME_REJECTED"
	NotBound             Reason = "NOT_BOUND"
	CallerNotAllowed     Reason = "CALLER_NOT_ALLOWED"
	Overloaded           Reason = "OVERLOADED"
	HSMUnavailable       Reason = "HSM_UNAVAILABLE"
	DirectoryUnavailable Reason = "DIRECTORY_UNAVAILABLE"
	StoreUnavailable     Reason = "STORE_UNAVAILABLE"
	RolledBack           Reason = "ROLLED_BACK" // the database is an earlier one than the service wrote
	Damaged              Reason = "DAMAGED"     // a row of it is not what the service wrote
)

// Reasons are all of them.
func Reasons() []Reason {
	return []Reason{Malformed, NoAttempt, UnknownDevice, RevokedDevice, OtherDevice, KMERejected, NotBound,
		CallerNotAllowed, Overloaded, HSMUnavailable, DirectoryUnavailable, StoreUnavailable, RolledBack, Damaged}
}
