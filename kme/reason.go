package kme

// A Reason is what a caller of the service may learn about a refusal: the reason in the google.rpc.ErrorInfo of an error, domain
// ErrorDomain.
type Reason string

// ErrorDomain is that of the service's errors.
const ErrorDomain = "kme"

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
)
