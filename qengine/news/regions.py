"""The 36 states and union territories of India, their languages and their 725 districts.

Facts only, as one readable table; everything else here is derived from it. Rules:

- names are spelled the one way every query and every file spells them;
- a region is asked in its main language, the first that is not English, and in English;
- a region's place in the table is its place in the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, cast

__all__ = ["District", "StateUT", "find_state", "get_all_regions", "get_region_by_name", "get_region_by_slug"]

RegionType = Literal["state", "ut"]

# name | type | languages (ISO 639-1), then the indented districts of it.
_TABLE: Final = """
Andaman and Nicobar Islands | ut | en hi bn ta
    Nicobar, North and Middle Andaman, South Andaman
Andhra Pradesh | state | te en
    Anantapur, Chittoor, East Godavari, Guntur, Krishna, Kurnool, Nellore, Prakasam, Srikakulam, Visakhapatnam,
    Vizianagaram, West Godavari, YSR Kadapa
Arunachal Pradesh | state | en hi
    Tawang, West Kameng, East Kameng, Papum Pare, Kurung Kumey, Kra Daadi, Lower Subansiri, Upper Subansiri,
    West Siang, East Siang, Siang, Upper Siang, Lower Siang, Lower Dibang Valley, Dibang Valley, Anjaw, Lohit, Namsai,
    Changlang, Tirap, Longding
Assam | state | as en bn hi
    Baksa, Barpeta, Biswanath, Bongaigaon, Cachar, Charaideo, Chirang, Darrang, Dhemaji, Dhubri, Dibrugarh, Goalpara,
    Golaghat, Hailakandi, Hojai, Jorhat, Kamrup Metropolitan, Kamrup, Karbi Anglong, Karimganj, Kokrajhar, Lakhimpur,
    Majuli, Morigaon, Nagaon, Nalbari, Dima Hasao, Sivasagar, Sonitpur, South Salmara-Mankachar, Tinsukia, Udalguri,
    West Karbi Anglong
Bihar | state | hi en ur
    Araria, Arwal, Aurangabad, Banka, Begusarai, Bhagalpur, Bhojpur, Buxar, Darbhanga, East Champaran (Motihari),
    Gaya, Gopalganj, Jamui, Jehanabad, Kaimur (Bhabua), Katihar, Khagaria, Kishanganj, Lakhisarai, Madhepura,
    Madhubani, Munger (Monghyr), Muzaffarpur, Nalanda, Nawada, Patna, Purnia (Purnea), Rohtas, Saharsa, Samastipur,
    Saran, Sheikhpura, Sheohar, Sitamarhi, Siwan, Supaul, Vaishali, West Champaran
Chandigarh | ut | hi en pa
    Chandigarh
Chhattisgarh | state | hi en
    Balod, Baloda Bazar, Balrampur, Bastar, Bemetara, Bijapur, Bilaspur, Dantewada (South Bastar), Dhamtari, Durg,
    Gariyaband, Janjgir-Champa, Jashpur, Kabirdham (Kawardha), Kanker (North Bastar), Kondagaon, Korba,
    Korea (Koriya), Mahasamund, Mungeli, Narayanpur, Raigarh, Raipur, Rajnandgaon, Sukma, Surajpur, Surguja
Dadra and Nagar Haveli and Daman and Diu | ut | gu en hi mr
    Dadra and Nagar Haveli, Daman, Diu
Delhi | ut | hi en ur pa
    Central Delhi, East Delhi, New Delhi, North Delhi, North East Delhi, North West Delhi, Shahdara, South Delhi,
    South East Delhi, South West Delhi, West Delhi
Goa | state | en mr kn
    North Goa, South Goa
Gujarat | state | gu en hi
    Ahmedabad, Amreli, Anand, Aravalli, Banaskantha (Palanpur), Bharuch, Bhavnagar, Botad, Chhota Udepur, Dahod,
    Dangs (Ahwa), Devbhoomi Dwarka, Gandhinagar, Gir Somnath, Jamnagar, Junagadh, Kachchh, Kheda (Nadiad), Mahisagar,
    Mehsana, Morbi, Narmada (Rajpipla), Navsari, Panchmahal (Godhra), Patan, Porbandar, Rajkot,
    Sabarkantha (Himmatnagar), Surat, Surendranagar, Tapi (Vyara), Vadodara, Valsad
Haryana | state | hi en pa
    Ambala, Bhiwani, Charkhi Dadri, Faridabad, Fatehabad, Gurgaon, Hisar, Jhajjar, Jind, Kaithal, Karnal, Kurukshetra,
    Mahendragarh, Mewat, Palwal, Panchkula, Panipat, Rewari, Rohtak, Sirsa, Sonipat, Yamunanagar
Himachal Pradesh | state | hi en
    Bilaspur, Chamba, Hamirpur, Kangra, Kinnaur, Kullu, Lahaul and Spiti, Mandi, Shimla, Sirmaur (Sirmour), Solan, Una
Jammu and Kashmir | ut | en hi ur
    Anantnag, Bandipore, Baramulla, Budgam, Doda, Ganderbal, Jammu, Kathua, Kishtwar, Kulgam, Kupwara, Poonch,
    Pulwama, Rajouri, Ramban, Reasi, Samba, Shopian, Srinagar, Udhampur
Jharkhand | state | hi en
    Bokaro, Chatra, Deoghar, Dhanbad, Dumka, East Singhbhum, Garhwa, Giridih, Godda, Gumla, Hazaribag, Jamtara,
    Khunti, Koderma, Latehar, Lohardaga, Pakur, Palamu, Ramgarh, Ranchi, Sahibganj, Seraikela-Kharsawan, Simdega,
    West Singhbhum
Karnataka | state | kn en te ta
    Bagalkot, Ballari (Bellary), Belagavi (Belgaum), Bengaluru (Bangalore) Rural, Bengaluru (Bangalore) Urban, Bidar,
    Chamarajanagar, Chikballapur, Chikkamagaluru (Chikmagalur), Chitradurga, Dakshina Kannada, Davangere, Dharwad,
    Gadag, Hassan, Haveri, Kalaburagi (Gulbarga), Kodagu, Kolar, Koppal, Mandya, Mysuru (Mysore), Raichur, Ramanagara,
    Shivamogga (Shimoga), Tumakuru (Tumkur), Udupi, Uttara Kannada (Karwar), Vijayapura (Bijapur), Yadgir
Kerala | state | ml en ta
    Alappuzha, Ernakulam, Idukki, Kannur, Kasaragod, Kollam, Kottayam, Kozhikode, Malappuram, Palakkad,
    Pathanamthitta, Thiruvananthapuram, Thrissur, Wayanad
Ladakh | ut | en hi ur
    Leh, Kargil
Lakshadweep | ut | en ml
    Agatti, Amini, Androth, Bithra, Chethlath, Kavaratti, Kadmath, Kalpeni, Kilthan, Minicoy
Madhya Pradesh | state | hi en
    Agar Malwa, Alirajpur, Anuppur, Ashoknagar, Balaghat, Barwani, Betul, Bhind, Bhopal, Burhanpur, Chhatarpur,
    Chhindwara, Damoh, Datia, Dewas, Dhar, Dindori, Guna, Gwalior, Harda, Hoshangabad, Indore, Jabalpur, Jhabua,
    Katni, Khandwa, Khargone, Mandla, Mandsaur, Morena, Narsinghpur, Neemuch, Panna, Raisen, Rajgarh, Ratlam, Rewa,
    Sagar, Satna, Sehore, Seoni, Shahdol, Shajapur, Sheopur, Shivpuri, Sidhi, Singrauli, Tikamgarh, Ujjain, Umaria,
    Vidisha
Maharashtra | state | mr en hi
    Ahmednagar, Akola, Amravati, Aurangabad, Beed, Bhandara, Buldhana, Chandrapur, Dhule, Gadchiroli, Gondia, Hingoli,
    Jalgaon, Jalna, Kolhapur, Latur, Mumbai City, Mumbai Suburban, Nagpur, Nanded, Nandurbar, Nashik, Osmanabad,
    Palghar, Parbhani, Pune, Raigad, Ratnagiri, Sangli, Satara, Sindhudurg, Solapur, Thane, Wardha, Washim, Yavatmal
Manipur | state | en hi
    Bishnupur, Chandel, Churachandpur, Imphal East, Imphal West, Jiribam, Kakching, Kamjong, Kangpokpi, Noney,
    Pherzawl, Senapati, Tamenglong, Tengnoupal, Thoubal, Ukhrul
Meghalaya | state | en hi
    East Garo Hills, East Jaintia Hills, East Khasi Hills, North Garo Hills, Ri Bhoi, South Garo Hills,
    South West Garo Hills, South West Khasi Hills, West Garo Hills, West Jaintia Hills, West Khasi Hills
Mizoram | state | en hi
    Aizawl, Champhai, Kolasib, Lawngtlai, Lunglei, Mamit, Saiha, Serchhip
Nagaland | state | en hi
    Dimapur, Kiphire, Kohima, Longleng, Mokokchung, Mon, Peren, Phek, Tuensang, Wokha, Zunheboto
Odisha | state | or en hi
    Angul, Balangir, Balasore, Bargarh, Bhadrak, Boudh, Cuttack, Deogarh, Dhenkanal, Gajapati, Ganjam, Jagatsinghapur,
    Jajpur, Jharsuguda, Kalahandi, Kandhamal, Kendrapara, Kendujhar (Keonjhar), Khordha, Koraput, Malkangiri,
    Mayurbhanj, Nabarangpur, Nayagarh, Nuapada, Puri, Rayagada, Sambalpur, Sonepur, Sundargarh
Puducherry | ut | ta en ml te
    Karaikal, Mahe, Pondicherry, Yanam
Punjab | state | pa en hi
    Amritsar, Barnala, Bathinda, Faridkot, Fatehgarh Sahib, Fazilka, Ferozepur, Gurdaspur, Hoshiarpur, Jalandhar,
    Kapurthala, Ludhiana, Mansa, Moga, Muktsar, Nawanshahr (Shahid Bhagat Singh Nagar), Pathankot, Patiala, Rupnagar,
    Sahibzada Ajit Singh Nagar (Mohali), Sangrur, Tarn Taran
Rajasthan | state | hi en
    Ajmer, Alwar, Banswara, Baran, Barmer, Bharatpur, Bhilwara, Bikaner, Bundi, Chittorgarh, Churu, Dausa, Dholpur,
    Dungarpur, Hanumangarh, Jaipur, Jaisalmer, Jalore, Jhalawar, Jhunjhunu, Jodhpur, Karauli, Kota, Nagaur, Pali,
    Pratapgarh, Rajsamand, Sawai Madhopur, Sikar, Sirohi, Sri Ganganagar, Tonk, Udaipur
Sikkim | state | ne en hi
    East Sikkim, North Sikkim, South Sikkim, West Sikkim
Tamil Nadu | state | ta en
    Ariyalur, Chennai, Coimbatore, Cuddalore, Dharmapuri, Dindigul, Erode, Kanchipuram, Kanyakumari, Karur,
    Krishnagiri, Madurai, Nagapattinam, Namakkal, Nilgiris, Perambalur, Pudukkottai, Ramanathapuram, Salem, Sivaganga,
    Thanjavur, Theni, Thoothukudi (Tuticorin), Tiruchirappalli, Tirunelveli, Tiruppur, Tiruvallur, Tiruvannamalai,
    Tiruvarur, Vellore, Viluppuram, Virudhunagar
Telangana | state | te en ur
    Adilabad, Bhadradri Kothagudem, Hyderabad, Jagtial, Jangaon, Jayashankar Bhoopalpally, Jogulamba Gadwal,
    Kamareddy, Karimnagar, Khammam, Komaram Bheem Asifabad, Mahabubabad, Mahabubnagar, Mancherial, Medak, Medchal,
    Nagarkurnool, Nalgonda, Nirmal, Nizamabad, Peddapalli, Rajanna Sircilla, Rangareddy, Sangareddy, Siddipet,
    Suryapet, Vikarabad, Wanaparthy, Warangal (Rural), Warangal (Urban), Yadadri Bhuvanagiri
Tripura | state | bn en hi
    Dhalai, Gomati, Khowai, North Tripura, Sepahijala, South Tripura, Unakoti, West Tripura
Uttar Pradesh | state | hi en ur
    Agra, Aligarh, Allahabad, Ambedkar Nagar, Amethi (Chatrapati Sahuji Mahraj Nagar), Amroha (J.P. Nagar), Auraiya,
    Azamgarh, Baghpat, Bahraich, Ballia, Balrampur, Banda, Barabanki, Bareilly, Basti, Bhadohi, Bijnor, Budaun,
    Bulandshahr, Chandauli, Chitrakoot, Deoria, Etah, Etawah, Faizabad, Farrukhabad, Fatehpur, Firozabad,
    Gautam Buddha Nagar, Ghaziabad, Ghazipur, Gonda, Gorakhpur, Hamirpur, Hapur (Panchsheel Nagar), Hardoi, Hathras,
    Jalaun, Jaunpur, Jhansi, Kannauj, Kanpur Dehat, Kanpur Nagar, Kanshiram Nagar (Kasganj), Kaushambi,
    Kushinagar (Padrauna), Lakhimpur - Kheri, Lalitpur, Lucknow, Maharajganj, Mahoba, Mainpuri, Mathura, Mau, Meerut,
    Mirzapur, Moradabad, Muzaffarnagar, Pilibhit, Pratapgarh, RaeBareli, Rampur, Saharanpur, Sambhal (Bhim Nagar),
    Sant Kabir Nagar, Shahjahanpur, Shamali (Prabuddh Nagar), Shravasti, Siddharth Nagar, Sitapur, Sonbhadra,
    Sultanpur, Unnao, Varanasi
Uttarakhand | state | hi en
    Almora, Bageshwar, Chamoli, Champawat, Dehradun, Haridwar, Nainital, Pauri Garhwal, Pithoragarh, Rudraprayag,
    Tehri Garhwal, Udham Singh Nagar, Uttarkashi
West Bengal | state | bn en hi
    Alipurduar, Bankura, Birbhum, Burdwan (Bardhaman), Cooch Behar, Dakshin Dinajpur (South Dinajpur), Darjeeling,
    Hooghly, Howrah, Jalpaiguri, Kalimpong, Kolkata, Malda, Murshidabad, Nadia, North 24 Parganas,
    Paschim Medinipur (West Medinipur), Purba Medinipur (East Medinipur), Purulia, South 24 Parganas,
    Uttar Dinajpur (North Dinajpur)
"""


@dataclass(frozen=True, slots=True)
class District:
    """A district: its name, spelled as queries spell it, and the slug of its state."""

    name: str
    state: str


@dataclass(frozen=True, slots=True)
class StateUT:
    """A state or union territory. Two are equal when their slugs are, so one is cheap to hash as a node."""

    slug: str
    name: str = field(compare=False)
    type: RegionType = field(compare=False)
    languages: tuple[str, ...] = field(compare=False)
    districts: tuple[District, ...] = field(compare=False, repr=False)

    @property
    def query_languages(self) -> tuple[str, ...]:
        """The languages to ask in: the main one (the first that is not ``en``), then English."""
        main = next((language for language in self.languages if language != "en"), "en")
        return (main,) if main == "en" else (main, "en")


def get_all_regions() -> tuple[StateUT, ...]:
    """All 36 states and union territories, by name."""
    return tuple(_BY_SLUG.values())


def get_region_by_slug(slug: str) -> StateUT:
    """The region with this slug, such as ``"tamil-nadu"``.

    Raises:
        ValueError: no region has it; the message names the nearest one that exists.

    >>> get_region_by_slug("delhi").query_languages
    ('hi', 'en')
    """
    region = _BY_SLUG.get(slug)
    if region is None:
        raise ValueError(f"unknown state {slug!r}: did you mean {_nearest(slug)!r}?")
    return region


def find_state(name: str) -> StateUT | None:
    """The region of that exact name, or None."""
    return _BY_NAME.get(name)


def get_region_by_name(name: str) -> StateUT:
    """The region of that exact name, such as ``"Tamil Nadu"``.

    Raises:
        ValueError: no region has it; the message names the nearest one that exists.
    """
    region = find_state(name)
    if region is None:
        nearest = difflib.get_close_matches(name.strip().title(), _BY_NAME, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown state {name!r}: did you mean {nearest!r}?")
    return region


def _nearest(slug: str) -> str:
    return difflib.get_close_matches(slug.strip().lower().replace(" ", "-"), _BY_SLUG, n=1, cutoff=0.0)[0]


def _parse(table: str) -> Iterator[StateUT]:
    heading, names = "", ""
    for line in [*table.strip().splitlines(), ""]:
        if line.startswith(" "):
            names += line
            continue
        if heading:
            yield _region(heading, names)
        heading, names = line, ""


def _region(heading: str, names: str) -> StateUT:
    name, kind, languages = heading.split(" | ")
    slug = name.lower().replace(" ", "-")
    districts = tuple(District(district.strip(), slug) for district in names.split(","))
    return StateUT(slug, name, cast(RegionType, kind), tuple(languages.split()), districts)


_BY_SLUG: Final[Mapping[str, StateUT]] = {region.slug: region for region in _parse(_TABLE)}
_BY_NAME: Final[Mapping[str, StateUT]] = {region.name: region for region in _BY_SLUG.values()}
